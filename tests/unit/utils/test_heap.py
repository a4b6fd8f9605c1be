"""Freed memory goes back to the system, also from below what is still in use."""

import os
import subprocess
import sys

import pytest

from worker.utils import heap

HOLES = """
import torch
from worker.utils import heap

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 10**6

torch.ones(31 << 18)  # freed at once: from now on glibc takes blocks of up to 31 MB from its heap
blocks, small = [], []
for _ in range(60):
    blocks.append(torch.ones(5 << 18))  # 5 MB
    small.append(torch.ones(64))
full = megabytes()
blocks.clear()
held = megabytes()
print(full, held, heap.trim(), megabytes())
"""


@pytest.mark.skipif(os.confstr_names.get("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
def test_holes_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    full, held, trimmed, after = done.stdout.split()
    assert trimmed == "True" and int(full) - int(held) < 100, "glibc gives holes back by itself: this is not needed"
    assert int(held) - int(after) > 200


def test_it_is_done_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = [0.0], list[float]()
    monkeypatch.setattr(heap, "trim", lambda: done.append(now[0]))
    looking = heap.HeapTrim(lambda: now[0])
    for second in range(200):
        now[0] = float(second)
        looking.look()
    assert done == [60.0, 120.0, 180.0]
