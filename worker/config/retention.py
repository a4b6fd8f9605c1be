"""What of the past is kept: how often there are checkpoints, how many, how far back a rollback can go; and the flags.

Must not know: torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Policy:
    """What is kept. every: versions between checkpoints; minutes: time between them (whichever comes first); keep: how
    many; history: how many versions back a rollback can go; transcripts_hours: how long texts stay in the journal once
    a checkpoint covers them (None: as long as the history)."""

    every: int = 50
    minutes: float = 30.0
    keep: int = 3
    history: int = 100
    transcripts_hours: float | None = None
    at_stop: bool = True


def state_options(command: F) -> F:
    """Click decorator: the flags of `Policy`, and where the state lies; `policy_of` reads them."""
    defaults = Policy()
    options = [
        click.option("--state-dir", type=click.Path(path_type=Path), help="Directory of journal and checkpoints."),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(1),
            default=defaults.every,
            help="Write a checkpoint after this many versions.",
        ),
        click.option(
            "--checkpoint-minutes",
            type=click.FloatRange(0),
            default=defaults.minutes,
            help="Write a checkpoint after this many minutes, if that is sooner.",
        ),
        click.option(
            "--keep-checkpoints",
            type=click.IntRange(2),
            default=defaults.keep,
            help="How many of the newest checkpoints to keep; 2 or more.",
        ),
        click.option(
            "--history",
            type=click.IntRange(0),
            default=defaults.history,
            help="How many versions back a rollback can go. A rollback trains at most this plus --checkpoint-every"
            " batches again. Redis keeps the manifests of this many versions.",
        ),
        click.option(
            "--keep-transcripts",
            type=click.FloatRange(0),
            metavar="HOURS",
            help="Delete texts older than this from the journal once a checkpoint covers them (default: only with"
            " the whole journal file).",
        ),
        click.option(
            "--checkpoint-at-stop/--no-checkpoint-at-stop",
            default=defaults.at_stop,
            help="Write one more checkpoint when the worker stops.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def policy_of(options: dict[str, Any]) -> Policy:
    """Takes its flags out of a command's options."""
    names = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "history", "keep_transcripts")
    return Policy(*(options.pop(name) for name in (*names, "checkpoint_at_stop")))
