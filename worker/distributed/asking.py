"""Calls of replica 0's store that may get no answer: whoever waits for one still hears signals, and says so.

    asker = Asker()
    answer = asker.call(lambda: store.check(["leader"]), stopping, meanwhile)
    for _ in waiting(answer := asker.submit(work)): ...

Where replica 0 is stopped (SIGSTOP), or its host went away without a word, torch's calls wait without end, and Python
hears no signal while the main thread is in one. So a thread makes them.

Must not know: Redis, vLLM, versions, the optimizer.
Invariant: calls are made one after the other, in the order in which they were given.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

log = logging.getLogger("tandem")
T = TypeVar("T")

LOOK_SECONDS = 0.2
"""Between two looks at what else there is to do, where an answer takes longer."""
AWAY_SECONDS = 60.0
"""Between two lines that say that replica 0 is not there."""


class OverError(Exception):
    """Whoever waited for an answer was told to stop."""


class Asker:
    """Makes calls, in a thread that begins with the first one."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """What `work()` will return or raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, work))
        return future

    def call(self, work: Callable[[], T], stopping: Callable[[], bool], meanwhile: Callable[[], object]) -> T:
        """`work()`; where it takes long, `meanwhile()` is called a few times a second. Raises `OverError` once
        `stopping()`."""
        answer = self.submit(work)
        for _ in waiting(answer):
            if stopping():
                raise OverError
            meanwhile()
        return answer.result()

    def close(self) -> None:
        """No more calls. One that gets no answer is left alone."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del call, future, work  # a store is kept open by whoever knows it


def waiting(answer: "Future[Any]") -> Iterator[None]:
    """Yields a few times a second until there is one."""
    while True:
        try:
            answer.exception(LOOK_SECONDS)
            return
        except TimeoutError:
            yield


class Away:
    """Says that replica 0 is not there: after `seconds`, and then each minute until it is `back`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.back()

    def back(self) -> None:
        self._since = self._said = None

    def say(self, who: str, then: str) -> None:
        """who: what is missing; then: what is to come."""
        now = time.monotonic()
        self._since = since = now if self._since is None else self._since
        if now - since < self._seconds or (self._said is not None and now - self._said < AWAY_SECONDS):
            return
        so_far = f", for {(now - since) / 60:.0f} min so far" if self._said is not None else ""
        log.warning("%s%s: %s", who, so_far, then)
        self._said = now

    _since: float | None
    _said: float | None
