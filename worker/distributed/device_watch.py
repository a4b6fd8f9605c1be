"""Ends collectives of a GPU that somebody does not take part in.

    watch.began(ended)     a collective was launched; `ended()` says whether the device is through with it
    watch.give_up()        somebody who takes part in them is gone: all are ended
    watch.failed           that, or one of them took too long, and all were ended

NCCL waits on the device, for ever and without a word: whoever waits for the device then waits with it, and torch's own
timeout would end the process (torch 2.11; seen on two H200). So a thread looks, and calls `abort`, which ends what is
waiting: what is in the tensors afterwards means nothing.

Must not know: Redis, vLLM, the optimizer.
Invariants: `failed` is set before anything is ended: whoever has waited for the device, and finds it not set, has whole
sums. `abort` is called once at most, and not after `close`.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("tandem")

PACE = 0.2
"""Seconds between two looks, while anything is under way."""


TORCH_WATCHES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}
"""torch's own watches of NCCL. The first two end the process. With the third, torch's monitor writes what the
collectives were to a file once a member has failed, and then sleeps 8 minutes by its source, while whoever closes the
group waits for it. Of the fourth, four times as long is slept for each collective that was ended, also where no file is
written: 60 s by default (torch 2.11; both waits seen on two H200, the first for over a minute)."""


def watch_alone() -> None:
    """Before a group is made: have torch's own watches of NCCL off, unless the environment says otherwise."""
    for name, value in TORCH_WATCHES.items():
        os.environ.setdefault(name, value)


class DeviceWatch:
    """seconds: what a collective may take, from when the one before it has ended. abort: ends all of them. whose: who
    takes part, for the log."""

    def __init__(self, seconds: float, abort: Callable[[], None], pace: float = PACE, whose: str = "replicas") -> None:
        self.failed = False
        self._whose, self._ending = whose, threading.Lock()
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

    @property
    def waiting(self) -> float:
        """For how many seconds none has ended; 0 while none is under way."""
        try:
            began = self._under_way[0][0]
        except IndexError:
            return 0.0
        return time.monotonic() - max(self._moved, began)

    def give_up(self) -> None:
        """End all of them."""
        with self._ending:
            if self.failed or self._closed:
                return
            self.failed = True
            self._abort()

    def close(self) -> None:
        """Look no more."""
        with self._ending:
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
            elif self.waiting > self._seconds:
                log.warning("a sum over %s took more than %g s: it is given up", self._whose, self._seconds)
                self.give_up()
                return
            else:
                time.sleep(self._pace)
