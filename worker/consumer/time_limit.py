"""A time limit on work of the main thread that nothing swallows by accident.

Invariants: what is raised is no `Exception`, so that an `except Exception` around a template or a tokenizer does not
eat it; it is raised again every second, so that a destructor or a bare `except` that eats one does not eat the limit;
nothing is raised after the block has been left, since that could cut a step short; time in which others had the CPU, or
in which the process was stopped, does not count as the block's.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

AGAIN = 1.0
"""Seconds after which it is raised again, if the work goes on."""
PATIENCE = 10
"""How many times the limit may pass on the clock for work that computes less than the limit: it waits for a CPU, or it
hangs."""


class TimeLimitExceeded(BaseException):
    """The block took too long. For whoever set the limit to catch, and nobody in between."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in the block (SIGALRM) once it has computed for `seconds`, or `PATIENCE` times as long
    has passed. Only the main thread can be interrupted so; elsewhere there is no limit. An alarm that was set before
    goes on afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside, began, computed, passed = True, time.monotonic(), time.thread_time(), seconds - AGAIN

    def expired(signum: int, frame: FrameType | None) -> None:
        nonlocal passed
        passed += AGAIN  # by alarms, not by the clock: those of a time in which the process was stopped are one
        if inside and (time.thread_time() - computed >= seconds or passed >= PATIENCE * seconds):
            raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, expired)
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            yield
        finally:
            inside = False  # a signal just before this line is raised here; the next is a second away
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), again)
