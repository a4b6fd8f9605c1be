"""What processes hold: memory of the GPU by process and in all, and on a CPU their proportional share (PSS).

Must not know: what the processes do. Amounts are bytes.
"""

import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Self

import torch

from worker.utils.child_process import die_with_parent


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants that live."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def held_by(groups: dict[str, int]) -> dict[str, int | None]:
    """Bytes that each group (name -> pid at the head of a process tree) holds: of the GPU, where there is one, as
    nvidia-smi says (None where it names no such process), else PSS. On a GPU also "device": all that is in use."""
    if not torch.cuda.is_available():
        return {name: sum(pss(one) for one in tree(pid)) for name, pid in groups.items()}
    ask = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    said = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
    by_pid = {int(pid): int(mib) << 20 for pid, mib in re.findall(r"^(\d+), (\d+)$", said, re.MULTILINE)}
    held: dict[str, int | None] = {}
    for name, pid in groups.items():
        own = [by_pid[one] for one in tree(pid) if one in by_pid]
        held[name] = sum(own) if own else None
    return held | {"device": device_used()}


def device_used() -> int:
    """Of the GPU, by everybody; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def pss(pid: int) -> int:
    """A process's memory, what it shares divided by those who share it; 0 if it has gone."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class Highest:
    """The most of the GPU's memory that was in use during the block, looked at every `every` seconds."""

    def __init__(self, every: float = 0.02) -> None:
        self.bytes = device_used()
        self._every, self._over = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if torch.cuda.is_available():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            self.bytes = max(self.bytes, device_used())


class ProcessWatch:
    """The most that each process, and all of them together, held of the GPU during the block, as nvidia-smi says.

    It asks every `every` seconds, from a process without a CUDA context, which itself would take half a GB. Without a
    GPU it knows of nothing. `by_pid`: bytes by pid; `device`: bytes in use, by everybody.
    """

    def __init__(self, every: int = 1) -> None:
        self.by_pid: dict[int, int] = {}
        self.device = 0
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        command = ["nvidia-smi", "-i", gpu, "--format=csv,noheader,nounits", "-l", str(every)]
        self._commands = [[*command, "--query-compute-apps=pid,used_gpu_memory"], [*command, "--query-gpu=memory.used"]]
        self._asked: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for command in self._commands if torch.cuda.is_available() else ():
            asked = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
            thread = threading.Thread(target=self._read, args=(asked,), daemon=True)
            thread.start()
            self._asked.append(asked)
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        for asked in self._asked:
            asked.kill()
            asked.wait()
        for thread in self._threads:
            thread.join()

    def held(self, pid: int) -> int:
        """By the process tree below `pid`, which lives."""
        return sum(self.by_pid.get(one, 0) for one in tree(pid))

    def _read(self, asked: "subprocess.Popen[str]") -> None:
        assert asked.stdout is not None
        for line in asked.stdout:
            numbers = [int(word) << 20 for word in re.findall(r"\d+", line)]
            if len(numbers) == 2:
                pid = numbers[0] >> 20
                self.by_pid[pid] = max(self.by_pid.get(pid, 0), numbers[1])
            elif numbers:
                self.device = max(self.device, numbers[0])
