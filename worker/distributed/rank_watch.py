"""Looks after the processes of ranks while rank 0 is at work with them: who is stopped, and who is waited for.

    watch = RankWatch(tell, device=collectives)
    with watch.over(others):            # a command is under way
        watch.silent = other            # from whom an answer is waited for now

A process that is stopped (SIGSTOP, a debugger) computes nothing until it is woken: after `STOPPED_SECONDS` it is
killed, and whoever waits for it is told by its connections. Whether one that sleeps hangs, nobody can tell from a slow
one: that it is waited for is said, and rank 0's limit ends it.

On a GPU the others' end is not heard of by connections: sums on the device go on waiting. So what is under way there is
given up as soon as a process is gone; and rank 0 waits for the others while no sum ends.

Must not know: torch, Redis, vLLM.
Invariants: seconds are counted by looks, so that no time counts in which we were stopped ourselves; the thread ends
with the block. In a sum (`torch.distributed` is on our stack) and without computing, rank 0 waits for the others.
"""

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from worker.distributed.device_watch import DeviceWatch
from worker.utils.process_state import doing, is_stopped

log = logging.getLogger("tandem")

PACE = 1.0
"""Seconds between two looks."""
STOPPED_SECONDS = 10.0
"""How long a process may be stopped that rank 0 needs; less than the least lease of a server that stands still."""
SHOWN_SECONDS = 5.0
"""How long one is waited for before it is told."""
LOGGED_SECONDS = (30.0, 90.0, 180.0)
"""When the log says so."""


@dataclass
class Other:
    """The process of another rank. why: what ended it, where that was us."""

    rank: int
    process: subprocess.Popen[bytes]
    sock: socket.socket
    why: str | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"


Tell = Callable[[Sequence[Other], float], object]
"""Hears who is waited for, from the watch's thread, and since when (seconds since 1970); at the end: nobody."""


class RankWatch:
    """pace: seconds between two looks. stopped_seconds: as `STOPPED_SECONDS`. device: of sums on rank 0's GPU."""

    def __init__(
        self,
        tell: Tell,
        pace: float = PACE,
        stopped_seconds: float = STOPPED_SECONDS,
        device: DeviceWatch | None = None,
    ) -> None:
        self._tell, self._pace, self._stopped_seconds, self.device = tell, pace, stopped_seconds, device
        self.silent: Other | None = None
        """Whose answer rank 0 waits for, with its own work done."""

    @contextlib.contextmanager
    def over(self, others: Sequence[Other]) -> Iterator[None]:
        """Inside, `others`, which may grow, are looked after. For the thread that works with them."""
        over = threading.Event()
        thread = threading.Thread(
            target=self._look, args=(others, threading.get_ident(), over), name="ranks", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self.silent = None
            over.set()
            thread.join()

    def _look(self, others: Sequence[Other], ours: int, over: threading.Event) -> None:
        stopped, waited, looks = dict[int, int](), list[Other](), 0
        told, clock = False, time.pthread_getcpuclockid(ours)
        computed = time.clock_gettime(clock)
        while not over.wait(self._pace):
            for other in list(others):
                stopped[other.rank] = stopped.get(other.rank, 0) + 1 if is_stopped(other.process.pid) else 0
                self._see_stopped(other, stopped[other.rank])
                if self.device is not None and other.process.poll() is not None:
                    self.device.give_up()
            before, computed = computed, time.clock_gettime(clock)
            idle = computed - before < self._pace / 100
            found = [other for other in list(others) if stopped[other.rank]] or self._waited(others, ours, idle)
            looks = looks + 1 if found == waited else 1
            waited = found
            seconds = looks * self._pace
            if waited and (seconds >= SHOWN_SECONDS or any(stopped.values())):
                self._tell(waited, time.time() - seconds)
                told = True
            elif told:
                self._tell([], 0.0)
                told = False
            if waited and any(seconds - self._pace < at <= seconds for at in LOGGED_SECONDS):
                doings = ", ".join(f"{other.name}, which {doing(other.process.pid)}" for other in waited)
                log.warning("for %.0f s rank 0 has waited for %s", seconds, doings)
        if told:
            self._tell([], 0.0)

    def _see_stopped(self, other: Other, looks: int) -> None:
        if looks == 1:
            log.warning(
                "%s is stopped (SIGSTOP, or a debugger) and computes nothing: `kill -CONT %d` wakes it, and in %g s it"
                " is ended",
                other.name, other.process.pid, self._stopped_seconds,
            )  # fmt: skip
        if looks * self._pace >= self._stopped_seconds and other.why is None:
            other.why = f"{other.name} was stopped for {self._stopped_seconds:g} s, and was ended"
            other.process.kill()

    def _waited(self, others: Sequence[Other], ours: int, idle: bool) -> list[Other]:
        if (silent := self.silent) is not None:
            return [silent]
        if self.device is not None:
            return list(others) if self.device.waiting > self._pace else []
        return list(others) if idle and _in_a_sum(sys._current_frames().get(ours)) else []


def _in_a_sum(frame: FrameType | None) -> bool:
    """Whether a thread waits in `torch.distributed`."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.f_back
    return False
