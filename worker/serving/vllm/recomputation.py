"""Holds the next version back until the requests that the last one threw back have been computed again.

Without it, versions that come faster than long prompts are recomputed would keep every request from ever ending.
Must not know: vLLM, sockets. Invariant: between two versions, recomputing takes at most half of the time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

POLL_SECONDS = 0.05


class Recomputation:
    """progress(): request id -> tokens it has made so far, for the requests that may be inside the engine."""

    def __init__(
        self,
        progress: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._progress, self._clock, self._sleep = progress, clock, sleep
        self._running: asyncio.Task[None] | None = None
        self.left = 0
        """Requests that have made no token yet since the last version."""
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self) -> None:
        """The requests that run now are about to be computed again."""
        if self._running is not None:
            self._running.cancel()
        self._settle()
        self._running = asyncio.create_task(self._watch(self._progress()))

    async def over(self, seconds: float) -> float:
        """Wait until the next version may come; the seconds that took. TimeoutError after `seconds`."""
        started = time.monotonic()
        if self._running is not None:
            await asyncio.wait_for(asyncio.shield(self._running), seconds)
        return time.monotonic() - started

    @property
    def seconds(self) -> float:
        """In which at least one request was still being computed again: since the start, and only growing."""
        return self._seconds + (self._clock() - self._since if self._since is not None else 0.0)

    def _settle(self) -> None:
        self._seconds, self._since = self.seconds, None

    async def _watch(self, before: dict[str, int]) -> None:
        started = self._since = self._clock()
        while self._count(before):
            await self._sleep(POLL_SECONDS)
        self._settle()
        if before:
            await self._sleep(self._clock() - started)  # as long again for answers

    def _count(self, before: dict[str, int]) -> int:
        now = self._progress()
        self.left = sum(now.get(request, made + 1) <= made for request, made in before.items())
        return self.left
