"""Whether Redis may throw queued transcripts away, as the worker published it in `weights:state`.

A producer's Redis user may not ask Redis itself (INFO, CONFIG).
Invariants: what is not known is said to be unknown, never guessed.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

POLICY, LIMIT = "maxmemory_policy", "maxmemory"
"""Fields of `weights:state`, and of Redis' INFO: the policy's name, and the limit in bytes (0: none)."""

UNKNOWN = "unknown"

LOOK_SECONDS = 600.0
"""How long a producer relies on what it has read."""

log = logging.getLogger("tandem.producer")


@dataclass(frozen=True, slots=True)
class Eviction:
    """What Redis does when its memory is full. policy: Redis' word, or "unknown". maxmemory: bytes, 0: no limit."""

    policy: str = UNKNOWN
    maxmemory: int | None = None

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Eviction":
        """From the fields of `weights:state` or of INFO; unknown where they are missing or no policy."""
        policy, limit = fields.get(POLICY, ""), fields.get(LIMIT, "")
        if policy != "noeviction" and not policy.startswith(("allkeys-", "volatile-")):
            return cls()
        return cls(policy, int(limit) if limit.isdecimal() else None)

    @property
    def known(self) -> bool:
        return self.policy != UNKNOWN

    @property
    def loses_jobs(self) -> bool:
        """Whether queued transcripts, and the ledger, can be evicted."""
        return self.policy.startswith("allkeys-") and self.maxmemory != 0

    @property
    def problem(self) -> str | None:
        """What can be lost, in one sentence; None where nothing can, or where it is unknown."""
        if not self.known or self.policy == "noeviction" or self.maxmemory == 0:
            return None
        lost = (
            "queued transcripts, and the ledger that keeps them from being trained twice"
            if self.loses_jobs
            else "failed transcripts and the worker's lock"
        )
        return (
            f"Redis evicts keys when its memory is full (maxmemory-policy {self.policy}): {lost} can be lost"
            " silently; set maxmemory-policy noeviction"
        )

    def __str__(self) -> str:
        """allkeys-lru, noeviction, unknown; with "(no limit)" where nothing is ever evicted."""
        return self.policy + (" (no memory limit)" if self.maxmemory == 0 and self.policy != "noeviction" else "")


class EvictionLog:
    """Warns the application's log of what Redis may lose: at its first transcript, and again when that changes."""

    def __init__(self) -> None:
        self._next = 0.0
        self._said: Eviction | None = None

    def due(self) -> bool:
        """Whether to look (again)."""
        return time.monotonic() >= self._next

    def say(self, found: Eviction, where: str) -> None:
        """Log `found`, unless it was logged already."""
        self._next = time.monotonic() + LOOK_SECONDS
        if found != self._said and found.problem:
            log.warning("%s: %s", where, found.problem)
        elif found != self._said and not found.known:
            log.info("%s: whether Redis evicts queued transcripts is unknown until a worker has started", where)
        self._said = found
