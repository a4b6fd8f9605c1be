"""Whether Redis may throw queued transcripts away, as the worker published it in `weights:state`.

A producer's Redis user may not ask Redis itself (INFO, CONFIG). Must not know: how to talk to Redis.
Invariants: what is not known is said to be unknown, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

POLICY, LIMIT = "maxmemory_policy", "maxmemory"
"""Fields of `weights:state`, and of Redis' INFO: the policy's name, and the limit in bytes (0: none)."""

UNKNOWN = "unknown"


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
