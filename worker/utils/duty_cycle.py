"""The duty cycle: after training, the worker rests until training has taken no more than a part of the time.

Worker and server share one device, so what training leaves alone is the server's. Must not know: torch, Redis.
Invariant: a rest is owed for the work that was done, never for the time that passed; time in which nothing was trained,
for whatever reason, counts as rest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from producer.errors import TandemError


class Duty:
    """part: of the time, in (0, 1], that work may take; 1 never rests. clock: seconds that only grow."""

    def __init__(self, part: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < part <= 1:
            raise TandemError("--duty-cycle is the part of the time that training may take: above 0, at most 1")
        self.part, self.clock = part, clock
        self._until = clock()

    @contextmanager
    def work(self) -> Iterator[None]:
        """What runs inside is work, and owes a rest of busy * (1 / part - 1) seconds, on top of what is owed still."""
        started = self.clock()
        owed = max(0.0, self._until - started)
        try:
            yield
        finally:
            ended = self.clock()
            self._until = ended + owed + (ended - started) * (1 / self.part - 1)

    def left(self) -> float:
        """Seconds of rest that are still owed."""
        return max(0.0, self._until - self.clock())
