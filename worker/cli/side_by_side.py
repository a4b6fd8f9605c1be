"""`tandem worker --replicas N`: N workers on this host, one a replica, started and stopped as one.

Each is `tandem worker --replica I/N` with the same flags, a process of its own in a session of its own: a terminal's
Ctrl-C reaches us alone, and they end with us, however we end.

Must not know: torch, Redis. Invariant: told to stop, replica 0 is told first; it takes the others along.
"""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from worker.utils.child_process import die_with_parent

log = logging.getLogger("tandem")

LOOK_SECONDS = 0.2


def run_side_by_side(arguments: Sequence[str], count: int) -> int:
    """To their end; replica 0's exit code, as a shell has it. arguments: of `tandem`, with --replicas in them."""
    given = without_option(arguments, "--replicas")
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "worker.cli", *given, "--replica", f"{number}/{count}"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        for number in range(count)
    ]
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: _stop(workers))
    said: set[int] = set()
    while workers[0].poll() is None:
        for number, worker in enumerate(workers):
            if worker.poll() is not None and number not in said:
                said.add(number)
                log.warning(
                    "replica %d ended with %d: the others go on; `tandem worker --replica %d/%d` starts it again",
                    number, worker.returncode, number, count,
                )  # fmt: skip
        time.sleep(LOOK_SECONDS)
    if code := workers[0].returncode:
        log.error("replica 0 ended with %d: the others are told to stop", code)
    _stop(workers)  # one that was not there yet has not heard of the end
    for worker in workers:
        worker.wait()
    return code if code >= 0 else 128 - code


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


def _stop(workers: Sequence[subprocess.Popen[Any]]) -> None:
    """Replica 0, which takes the others along; where it has ended, the others."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running[:1] if workers[0] in running else running:
        worker.send_signal(signal.SIGTERM)
