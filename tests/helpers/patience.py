"""Waiting in tests: for what must happen, however busy the machine is.

A limit here ends a hang. No test may fail because a machine is slow, so no limit is near what anything takes.
"""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 600.0
"""Seconds that whatever must happen may take."""


class TimedOut(AssertionError):
    """Something that must happen did not."""


def until(condition: Callable[[], Any], what: str, timeout: float = PATIENCE, pace: float = 0.01) -> None:
    """Wait until `condition()` holds; it is asked every `pace` seconds. TimedOut says `what` was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimedOut(f"waited {timeout:g} s in vain: {what}")
        time.sleep(pace)
