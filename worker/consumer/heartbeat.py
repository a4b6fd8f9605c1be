"""A thread that beats: signs of life go on while the main thread is inside a step for minutes.

Must not know: RQ.
Invariants: at most one beat at a time; an error other than Redis being away ends the beat and is kept for the main
thread to raise between steps, never thrown into it.
"""

import threading
from collections.abc import Callable

import redis


class Heartbeat:
    """Calls `beat` every `interval` seconds until `stop()`. Redis being away is no error: the main thread says so."""

    def __init__(self, interval: float, beat: Callable[[], None]) -> None:
        self.interval = interval
        self.beat = beat
        self.error: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="tandem-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self.beat()
            except redis.RedisError:
                continue  # the next beat may get through; leases outlive several
            except Exception as error:
                self.error = error
                return

    def check(self) -> None:
        """Raise what ended the beat, if anything did."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
