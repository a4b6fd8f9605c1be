"""What the kernel says of another process of ours: is it stopped, and how much has it computed.

A process that SIGSTOP, a terminal or a debugger stopped computes nothing until somebody wakes it. That is the one kind
of hanging that can be told from slowness at once. Must not know: torch, Redis.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

STOPPED = "Tt"
"""Of Linux' letters: stopped by a signal, and by a debugger."""
COMPUTES, WAITS_FOR_A_DISK, SLEEPS = "computes", "waits for a disk", "sleeps"
"""What `doing` says of one that is neither stopped nor gone."""


@dataclass(frozen=True)
class ProcessState:
    """letter: as in /proc/PID/stat. cpu: seconds that all of its threads have computed."""

    letter: str
    cpu: float

    @property
    def stopped(self) -> bool:
        return self.letter in STOPPED


def state_of(pid: int) -> ProcessState | None:
    """None: there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessState(fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def is_stopped(pid: int) -> bool:
    """Whether it waits for SIGCONT, or for its debugger."""
    state = state_of(pid)
    return state is not None and state.stopped


def doing(pid: int, seconds: float = 0.2) -> str:
    """What it does, as a verb: it is watched for so long."""
    before = state_of(pid)
    if before is None:
        return "has ended"
    if before.stopped:
        return "is stopped"
    time.sleep(seconds)
    after = state_of(pid)
    if after is None or after.letter in "ZX":
        return "has ended"
    if after.letter == "R" or after.cpu > before.cpu:
        return COMPUTES
    return WAITS_FOR_A_DISK if after.letter == "D" else SLEEPS
