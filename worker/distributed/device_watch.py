"""Ends collectives of a GPU that somebody does not take part in.

    watch.began(ended)     a collective was launched; `ended()` says whether the device is through with it
    watch.failed           one of them took too long, and all were ended

NCCL waits on the device, for ever and without a word: whoever waits for the device then waits with it, and torch's own
timeout would end the process (torch 2.11; seen on two H200). So a thread looks, and calls `abort`, which ends what is
waiting: what is in the tensors afterwards means nothing.

Must not know: Redis, vLLM, the optimizer.
Invariant: `failed` is set before anything is ended: whoever has waited for the device, and finds it not set, has whole
sums.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("tandem")

PACE = 0.2
"""Seconds between two looks, while anything is under way."""


class DeviceWatch:
    """seconds: what a collective may take, from when the one before it has ended. abort: ends all of them."""

    def __init__(self, seconds: float, abort: Callable[[], None], pace: float = PACE) -> None:
        self.failed = False
        self._seconds, self._abort, self._pace = seconds, abort, pace
        self._under_way: deque[tuple[float, Callable[[], bool]]] = deque()
        self._something, self._closed, self._moved = threading.Event(), False, 0.0
        self._thread: threading.Thread | None = None

    def began(self, ended: Callable[[], bool]) -> None:
        """They end in the order in which they began."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="collectives", daemon=True)
            self._thread.start()
        self._under_way.append((time.monotonic(), ended))
        self._something.set()

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        self._something.set()

    def _look(self) -> None:
        while not self._closed:
            while self._under_way and self._under_way[0][1]():
                self._under_way.popleft()
                self._moved = time.monotonic()
            if not self._under_way:
                self._something.wait()
                self._something.clear()
            elif time.monotonic() > max(self._moved, self._under_way[0][0]) + self._seconds:
                self.failed = True
                log.warning("a sum over replicas took more than %g s: it is given up", self._seconds)
                self._abort()
                return
            else:
                time.sleep(self._pace)
