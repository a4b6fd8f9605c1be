"""How updates are applied, and how much of the time serving keeps: the flags and what they mean together.

Must not know: torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import click

from producer.errors import TandemError

F = TypeVar("F", bound=Callable[..., Any])
Apply = Literal["auto", "burst", "factors", "streaming"]
Graphs = Literal["auto", "off"]
MAX_TOKENS = 8192
"""Of a version, where nothing else is asked for; `tandem serve` leaves memory for as many."""
SERVING_SHARE = 0.9
"""Of the time, where nothing else is asked for."""


@dataclass(frozen=True)
class ApplySettings:
    """One field a flag; see `apply_options` for what each means."""

    apply: Apply = "auto"
    hogwild: bool = False
    serving_share: float = SERVING_SHARE
    memory: float | None = None
    graphs: Graphs = "off"
    """Without a flag off: who trains nothing new captures nothing."""

    def __post_init__(self) -> None:
        if self.hogwild and self.apply != "streaming":
            raise TandemError(
                f"--hogwild writes weights while gradients are computed: it needs --apply streaming, not {self.apply}"
            )


def apply_option(command: F) -> F:
    """Click decorator: --apply, for every command that trains or rebuilds a server's weights."""
    return click.option(
        "--apply",
        type=click.Choice(["auto", "burst", "factors", "streaming"]),
        default="auto",
        help="burst: keep all gradients and write in one short sweep. factors: keep the two factors of each gradient;"
        " takes less memory for short batches, and writes in about twice the time. streaming: apply each gradient when"
        " backward makes it; takes a few GB, and the server is paused meanwhile. auto: burst if it fits, else factors"
        " for batches that fit and streaming for longer ones; burst on a CPU.",
    )(command)


def max_tokens_option(command: F) -> F:
    """Click decorator: --max-tokens, for every command that trains or rebuilds a server's weights."""
    return click.option(
        "--max-tokens",
        type=click.IntRange(1),
        default=MAX_TOKENS,
        help="Maximum number of tokens in a version. GPU memory is planned for this number.",
    )(command)


def memory_option(command: F) -> F:
    """Click decorator: --memory, for every command that trains or rebuilds a server's weights."""
    return click.option(
        "--memory",
        type=click.FloatRange(0, min_open=True),
        metavar="GB",
        help="Maximum GPU memory of this process, without the shared weights (default: all free memory).",
    )(command)


def apply_options(command: F) -> F:
    """Click decorator: adds every flag of `ApplySettings`; `apply_settings_of` reads them."""
    options = [
        apply_option,
        click.option(
            "--hogwild",
            is_flag=True,
            help="With --apply streaming: do not pause the server for the write. Answers may mix two versions.",
        ),
        click.option(
            "--serving-share",
            type=click.FloatRange(0, 1, max_open=True),
            show_default=False,
            metavar="SHARE",
            help="The part of the time that updates leave to running requests: after a version the worker rests until"
            " what it took from them is paid. 0: never rest. Without requests nothing is taken. Default:"
            f" {SERVING_SHARE:g}.",
        ),
        click.option("--duty-cycle", type=click.FloatRange(0, 1, min_open=True), hidden=True),
        memory_option,
        click.option(
            "--graphs",
            type=click.Choice(["auto", "off"]),
            default="auto",
            help="auto: on a GPU, replay short batches as CUDA graphs, which are made at the start, if their memory"
            " fits beside the longest batch; the memory plan says so. off: launch every kernel.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def apply_settings_of(options: dict[str, Any]) -> ApplySettings:
    """Takes its flags out of a command's options. Raises TandemError for flags that contradict each other."""
    share, duty = options.pop("serving_share"), options.pop("duty_cycle")
    if share is not None and duty is not None:
        raise TandemError(
            "--duty-cycle P is the former name of --serving-share 1-P: use --serving-share alone, without --duty-cycle"
        )
    asked = share if share is not None else SERVING_SHARE
    options["serving_share"] = asked if duty is None else 1 - duty
    return ApplySettings(**{field.name: options.pop(field.name) for field in fields(ApplySettings)})
