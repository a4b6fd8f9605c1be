"""The flags of the guards: outliers, the canary set, rehearsal.

Must not know: torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from producer.errors import TandemError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class GuardSettings:
    """One field a flag; see `guard_options` for what each means."""

    outliers: float = 8.0
    canary: Path | None = None
    canary_every: int = 10
    canary_bound: float | None = None
    auto_rollback: bool = False
    rehearse: float = 0.0
    dislikes_bound: float = 0.3

    def __post_init__(self) -> None:
        if (self.canary is None) != (self.canary_bound is None):
            raise TandemError("--canary FILE and --canary-bound LOSS go together: name both")
        if self.auto_rollback and self.canary is None:
            raise TandemError("--auto-rollback follows the canary set: name one with --canary and --canary-bound")


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
        click.option("--canary", type=click.Path(path_type=Path), help="File (JSONL) of held-out conversations."),
        click.option(
            "--canary-every",
            type=click.IntRange(1),
            default=defaults.canary_every,
            help="Score the canary set every so many versions.",
        ),
        click.option(
            "--canary-bound",
            type=click.FloatRange(0, min_open=True),
            help="Pause training if the loss of the canary set is above this, in nats per token.",
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
