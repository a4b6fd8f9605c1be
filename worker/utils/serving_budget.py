"""What updates may take from serving: every version is charged what it took, and the next one waits until that is paid.

A charge is in seconds of serving. Time pays for charges, 1 - share seconds each second. Must not know: torch, Redis.
Invariants: over any minute, the versions that began in it were charged at most (1 - share) * (60 + CREDIT) and one
version's charge. What was charged nothing owes nothing. A share of 0 never waits.
"""

import time
from collections import deque
from collections.abc import Callable

from producer.errors import TandemError

CREDIT = 5.0
"""Seconds of time in which nothing was owed that count for a later version: arrivals by a clock jitter."""
MINUTE = 60.0


class ServingBudget:
    """share: of the time, in [0, 1), that is serving's. clock: seconds that only grow. A new budget has no credit."""

    def __init__(self, share: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 <= share < 1:
            raise TandemError("--serving-share is the part of the time that serving keeps: 0 or more, below 1")
        self.share, self.clock = share, clock
        self._paid = clock()
        """When all that was charged so far is paid; in the past: since when nothing is owed."""
        self._charges: deque[tuple[float, float]] = deque()
        """(when, seconds), oldest first: the last minute's."""
        self.total = self._untold = 0.0
        """Seconds charged in all, and since `take`."""

    def begin(self) -> None:
        """A version begins: what is charged from now on is its debt."""
        self._paid = max(self._paid, self.clock() - CREDIT)

    def charge(self, seconds: float) -> None:
        """`seconds` were taken from serving, by the last version that began."""
        if seconds > 0:
            self._paid += seconds / (1 - self.share)
            self.total, self._untold = self.total + seconds, self._untold + seconds
            self._charges.append((self.clock(), seconds))
            self._forget()

    def take(self) -> float:
        """Seconds charged since the last call."""
        taken, self._untold = self._untold, 0.0
        return taken

    def left(self) -> float:
        """Seconds until the next version may begin."""
        return max(0.0, self._paid - self.clock()) if self.share else 0.0

    def recent(self) -> list[tuple[float, float]]:
        """(seconds ago, seconds) of each charge of the last minute, oldest first."""
        self._forget()
        return [(self.clock() - when, seconds) for when, seconds in self._charges]

    def _forget(self) -> None:
        while self._charges and self._charges[0][0] <= self.clock() - MINUTE:
            self._charges.popleft()
