"""`tandem worker --replicas N`: N workers on this host, one a replica, started and stopped as one.

Each is `tandem worker --replica I/N` with the same flags, a process of its own in a session of its own: a terminal's
Ctrl-C reaches us alone, and they end with us, however we end.

Must not know: torch, Redis. Invariants: told to stop, replica 0 is told first; it takes the others along. Each is told
once, since a second signal could cut short what it does last; one that is stopped (SIGSTOP) is woken to hear it. Once
we were told to stop we end: who has not ended `STOP_SECONDS` after it was told is killed.
"""

import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from worker.config.replica_options import PLACE
from worker.utils.child_process import die_with_parent
from worker.utils.hints import option_of
from worker.utils.process_state import is_stopped

log = logging.getLogger("tandem")

LOOK_SECONDS = 0.2
STOP_SECONDS = 600.0
"""How long one that was told to end may take: it ends its version, and may write a checkpoint."""
COMMAND = (sys.executable, "-m", "worker.cli")


def run_side_by_side(
    arguments: Sequence[str], count: int, command: Sequence[str] = COMMAND, seconds: float = STOP_SECONDS
) -> int:
    """To their end; replica 0's exit code, as a shell has it. arguments: of `tandem`, with --replicas in them. command:
    what takes them. seconds: as `STOP_SECONDS`."""
    workers = _Workers(without_option(arguments, "--replicas"), count, command, seconds)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: workers.asked_to_stop())
    log.info("started: %s", workers.left())
    while (code := workers.processes[0].poll()) is None:
        workers.look()
        time.sleep(LOOK_SECONDS)
    if code:
        log.error("replica 0 ended with %d: the others are told to stop", code)
    while any(process.poll() is None for process in workers.processes):
        workers.tell_all()  # one that was not there yet has not heard of the end
        workers.look()
        time.sleep(LOOK_SECONDS)
    return code if code >= 0 else 128 - code


class _Workers:
    """given: the arguments of each."""

    def __init__(self, given: Sequence[str], count: int, command: Sequence[str], seconds: float) -> None:
        self.given, self.count, self.seconds = given, count, seconds
        self.processes = [
            subprocess.Popen(
                [*command, *given, "--replica", f"{number}/{count}"],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            for number in range(count)
        ]
        self.told: dict[int, float] = {}
        """Who was told to end, and when (monotonic)."""
        self.said: set[tuple[int, str]] = set()
        self.asked = False
        """Whether we were told to stop."""

    def asked_to_stop(self) -> None:
        first, again, self.asked = self.processes[0], self.asked, True
        if again:
            log.info(
                "told to stop again, which changes nothing: %s still to end, after what they do, so that nothing is"
                " left half-written; who has not ended %g s after it was told is killed",
                self.left(), self.seconds,
            )  # fmt: skip
        elif first.poll() is None:
            log.info("told to stop: replica 0 ends after what it does, and takes the others along")
            self._tell(0)
            for process in self.processes:  # replica 0 may be waiting for one that is stopped
                process.send_signal(signal.SIGCONT)
        else:
            self.tell_all()

    def left(self) -> str:
        """Who has not ended, in words."""
        running = [f"replica {n} (process {p.pid})" for n, p in enumerate(self.processes) if p.poll() is None]
        return ", ".join(running) or "nobody"

    def tell_all(self) -> None:
        for number in range(self.count):
            self._tell(number)

    def _tell(self, number: int) -> None:
        if number not in self.told:
            self.told[number] = time.monotonic()
            for signum in (signal.SIGTERM, signal.SIGCONT):  # a stopped process gets no other signal before it is woken
                self.processes[number].send_signal(signum)

    def look(self) -> None:
        """Say who ended and who is stopped; kill who was told to end long ago."""
        for number, process in enumerate(self.processes):
            if process.poll() is not None:
                if number and not self.told and self._once(number, "ended"):
                    log.warning(
                        "replica %d ended with %d: the others go on; `%s`, with all other flags as here, starts it"
                        " again",
                        number, process.returncode, self._again(number),
                    )  # fmt: skip
            elif self._is_late(number) and self._once(number, "killed"):
                log.error(
                    "replica %d (process %d) did not end within %g s, and is killed: its next start mends what that"
                    " leaves",
                    number, process.pid, self.seconds,
                )  # fmt: skip
                process.kill()
            elif not is_stopped(process.pid):
                self.said.discard((number, "stopped"))
            elif self._once(number, "stopped"):
                log.warning(
                    "replica %d (process %d) is stopped, and computes nothing: `kill -CONT %d` wakes it",
                    number, process.pid, process.pid,
                )  # fmt: skip

    def _is_late(self, number: int) -> bool:
        return number in self.told and time.monotonic() - self.told[number] > self.seconds

    def _once(self, number: int, what: str) -> bool:
        new = (number, what) not in self.said
        self.said.add((number, what))
        return new

    def _again(self, number: int) -> str:
        """The command that starts a replica again, with its places."""
        places = [(name, option_of(self.given, name)) for name in ("--run-dir", "--state-dir")]
        named = [part for name, place in places if place is not None for part in (name, place)]
        own = [part.replace(PLACE, str(number)) for part in named]
        return shlex.join(["tandem", "worker", "--replica", f"{number}/{self.count}", *own])


def without_option(arguments: Sequence[str], name: str) -> list[str]:
    """`arguments` without the option `name` and its value."""
    left: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == name:
            next(rest, None)
        elif not argument.startswith(f"{name}="):
            left.append(argument)
    return left
