"""The flags of the guards: outliers, the canary set, rehearsal.

Must not know: torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from producer.errors import TandemError

CANARY = "canary"
"""Name of the canary set that was given none."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class GuardSettings:
    """One field a flag; see `guard_options` for what each means."""

    outliers: float = 8.0
    canary: tuple[tuple[str, Path], ...] = ()
    """Name and file of each canary set."""
    canary_every: int = 10
    canary_bound: tuple[tuple[str | None, float], ...] = ()
    """Of a set by its name, or of all that have none of their own; of two of one name the later one counts."""
    auto_rollback: bool = False
    rehearse: float = 0.0
    dislikes_bound: float = 0.3

    def __post_init__(self) -> None:
        names = [name for name, _ in self.canary]
        if len(set(names)) < len(names):
            raise TandemError("two canary sets have one name: give each its own, --canary NAME=FILE")
        if self.canary_bound and not names:
            raise TandemError("--canary-bound LOSS is the bound of a canary set: name one with --canary FILE")
        for name, _ in self.canary_bound:
            if name is not None and name not in names:
                raise TandemError(f"--canary-bound {name}=LOSS: there is no --canary {name}=FILE")
        if self.auto_rollback and not self.canary_bound:
            raise TandemError("--auto-rollback follows the canary set: name one with --canary and --canary-bound")

    def bound_of(self, name: str) -> float | None:
        """The highest loss of the canary set `name` that passes; None: it is only watched."""
        bounds = dict(self.canary_bound)
        return bounds.get(name, bounds.get(None))


class NamedSet(click.ParamType):
    """FILE or NAME=FILE."""

    name = "[NAME=]FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, file = _split(str(value))
        if not file:
            self.fail(f"{value!r} names no file", param, ctx)
        return name or CANARY, Path(file)


class NamedBound(click.ParamType):
    """LOSS or NAME=LOSS."""

    name = "[NAME=]LOSS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, float]:
        name, loss = _split(str(value))
        try:
            bound = float(loss)
        except ValueError:
            bound = math.nan
        if not 0 < bound < math.inf:
            self.fail(f"{loss!r} is not a number above 0", param, ctx)
        return name, bound


def _split(text: str) -> tuple[str | None, str]:
    """(NAME, VALUE) of NAME=VALUE; (None, text) where nothing that could be a name stands before a "="."""
    name, equals, value = text.partition("=")
    return (name, value) if equals and NAME.fullmatch(name) else (None, text)


def guard_options(command: F) -> F:
    """Click decorator: adds every flag of `GuardSettings`; `settings_of` reads them."""
    defaults = GuardSettings()
    options = [
        click.option(
            "--outliers",
            type=click.FloatRange(0),
            default=defaults.outliers,
            help="Set aside transcripts and batches that are broken: a loss above that of a guess and this many robust"
            " deviations over recent ones, or a gradient so far above them that its loss does not explain it; 0: none.",
        ),
        click.option(
            "--dislikes-bound",
            type=click.FloatRange(0),
            default=defaults.dislikes_bound,
            metavar="NATS",
            help="Refuse disliked answers once they have moved what the model expects in a few reference conversations"
            " (the canary set, if there is one) by this, in nats (KL) per token; 0: never.",
        ),
        click.option(
            "--canary",
            type=NamedSet(),
            multiple=True,
            help="File (JSONL) of held-out conversations, whose loss is watched. May be repeated with names; without a"
            f" name it is called {CANARY}.",
        ),
        click.option(
            "--canary-every",
            type=click.IntRange(1),
            default=defaults.canary_every,
            help="Score the canary set every so many versions.",
        ),
        click.option(
            "--canary-bound",
            type=NamedBound(),
            multiple=True,
            help="Pause training if the loss of this canary set, or of any, is above this, in nats per token.",
        ),
        click.option("--auto-rollback", is_flag=True, help="Also go back to the last version that passed."),
        click.option(
            "--rehearse",
            type=click.FloatRange(0, 4),
            default=defaults.rehearse,
            help="Earlier transcripts to train again with each new one, against forgetting.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def settings_of(options: dict[str, Any]) -> GuardSettings:
    """Takes its flags out of a command's options."""
    return GuardSettings(**{field.name: options.pop(field.name) for field in fields(GuardSettings)})
