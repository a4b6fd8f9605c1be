"""How many CPUs nobody uses just now: what a trainer beside a busy server may take without waiting for it.

Linux counts idle time for each CPU in /proc/stat. Must not know: torch.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

SAMPLE_SECONDS = 0.1
STAT = Path("/proc/stat")


def free_cpus(seconds: float = SAMPLE_SECONDS, sleep: Callable[[float], None] = time.sleep) -> float:
    """Sum of the idle shares of the CPUs that this process may run on, over the next `seconds`, in which it sleeps."""
    before, started = _idle_seconds(), time.monotonic()
    sleep(seconds)
    return max(0.0, _idle_seconds() - before) / (time.monotonic() - started)


def _idle_seconds() -> float:
    """Idle so far, waiting for disks included, summed over the CPUs of this process."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = (line.split() for line in STAT.read_text().splitlines())
    ticks = sum(int(row[4]) + int(row[5]) for row in rows if row and row[0] in ours)
    return ticks / os.sysconf("SC_CLK_TCK")
