"""What one case came to, and at which weights. Must not know: torch, the server."""

from dataclasses import dataclass

from worker.versions.evaluations import Score

SPARE = 32
"""Tokens beside twice the reference's that an answer may have."""


@dataclass(frozen=True)
class At:
    """Which weights."""

    version: int
    lineage: str


@dataclass(frozen=True)
class Found:
    """What one case came to. answer: the tokens that were generated, without the one that ends the turn; None if nobody
    asked."""

    at: At
    score: Score
    answer: tuple[int, ...] | None = None
