"""What an update does to cached keys, values and delta-net states: of running requests, and of prefixes.

`tandem serve` takes it as flags and hands it to vLLM's API process through two environment variables. Must not know:
vLLM, sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from worker.serving.vllm_flags import LaunchError

KEEP, RECOMPUTE = "keep", "recompute"
RUNNING_ENV = "TANDEM_RUNNING"
MAX_AGE_ENV = "TANDEM_PREFIX_MAX_AGE"


@dataclass(frozen=True)
class CachePolicy:
    """running: "keep" or "recompute". prefix_max_age: how many versions old a prefix may be for new requests."""

    running: str = KEEP
    prefix_max_age: int = 0

    def __post_init__(self) -> None:
        """Raises LaunchError for a combination that means nothing."""
        if self.running not in (KEEP, RECOMPUTE):
            raise LaunchError(f"--running {self.running}: use {KEEP} or {RECOMPUTE}")
        if self.prefix_max_age < 0:
            raise LaunchError(f"--prefix-max-age {self.prefix_max_age}: use 0 or more versions")
        if self.recompute and self.prefix_max_age:
            raise LaunchError(
                f"--prefix-max-age {self.prefix_max_age} cannot be used with --running {RECOMPUTE}: recomputing drops "
                "every cached prefix with each version. Leave one of them out"
            )

    @property
    def recompute(self) -> bool:
        """Whether running requests are computed again from their first token after each update."""
        return self.running == RECOMPUTE

    def environment(self) -> dict[str, str]:
        """The policy as variables for vLLM's processes."""
        return {RUNNING_ENV: self.running, MAX_AGE_ENV: str(self.prefix_max_age)}

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> CachePolicy:
        """The policy that `environment` was given; the default where nothing is said."""
        return cls(environment.get(RUNNING_ENV, KEEP), int(environment.get(MAX_AGE_ENV, "0")))


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --running and --prefix-max-age to a click command."""
    command = click.option(
        "--prefix-max-age",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="VERSIONS",
        help="A new request may read cached prefixes that are at most this many versions old. 0: only those of the "
        "current version. Higher values help chats that send their history with every turn: it is then not computed "
        "again after every version.",
    )(command)
    return click.option(
        "--running",
        type=click.Choice([KEEP, RECOMPUTE]),
        default=KEEP,
        show_default=True,
        help="What an update does to running requests. keep: they continue with their cached keys, values and "
        "states; only their later tokens come from the new weights. recompute: these caches are computed again with "
        "the new weights, and the next version waits until that is done.",
    )(command)
