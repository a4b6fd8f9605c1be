"""What the C library keeps of freed memory, given back to the system from time to time.

On a CPU a batch's activations lie in glibc's heap, which shrinks only from its end: one small block up there keeps all
below it. Batches of all sizes leave holes that the next largest does not fit, so the heap grows for hours
(`benchmarks/soak.py`). Must not know: torch. Invariant: where the C library cannot do it, nothing happens.
"""

import ctypes
import time
from collections.abc import Callable

EVERY = 60.0
"""Seconds between two times: giving back 0.3 GB takes some 30 ms, and the next batch takes it anew."""


def trim() -> bool:
    """Give back every page that holds nothing in use; whether there was one. glibc only (malloc_trim)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(give_back and give_back(0))


class HeapTrim:
    """`look()` between batches: trims when `EVERY` seconds have passed since the last time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def look(self) -> None:
        if self._clock() - self._last >= EVERY:
            trim()
            self._last = self._clock()
