"""`tandem rollback` as a child process, started from the page: whether it can be, what it says, how it ended.

Must not know: torch, Redis.
Invariants: one at a time; the URL of Redis, which may hold a password, is on no command line; Ctrl-C at the dashboard
does not reach the child, which may be in the middle of writing weights.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TAIL = 16 * 1024
"""Bytes of its output that are shown."""


@dataclass(frozen=True)
class Progress:
    """Of the last rollback. code: its exit code, None while it runs; seconds: since its start, or until its end."""

    target: int
    command: str
    seconds: float
    said: str
    code: int | None


class Rollbacks:
    """Of one dashboard. run_dir, state_dir: as the dashboard was told; None: the child finds its own. options: more
    of the command, such as --apply and --memory, which on a GPU are to be the worker's."""

    def __init__(
        self, redis_url: str, run_dir: Path, state_dir: Path | None = None, options: Sequence[str] = ()
    ) -> None:
        self.redis_url, self.run_dir, self.state_dir, self.options = redis_url, run_dir, state_dir, list(options)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._target, self._command, self._started, self._ended = 0, "", 0.0, 0.0

    def arguments(self, target: int, requeue: bool) -> list[str]:
        """After `tandem`."""
        found = ["rollback", str(target), "--reason", "from the dashboard", "--run-dir", str(self.run_dir)]
        found += ["--state-dir", str(self.state_dir)] if self.state_dir else []
        return found + self.options + (["--requeue"] if requeue else [])

    def command(self, target: int, requeue: bool = False) -> str:
        """The command to copy, for the shell of the machine where the server runs."""
        return shlex.join(["tandem", *self.arguments(target, requeue)])

    def start(self, target: int, requeue: bool) -> bool:
        """False where one is running."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return False
            if self._output is not None:
                self._output.close()
            self._output = tempfile.TemporaryFile()  # noqa: SIM115  (read for as long as the page shows it)
            self._target, self._command = target, self.command(target, requeue)
            self._started, self._ended = time.monotonic(), 0.0
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *self.arguments(target, requeue)],
                stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"REDIS_URL": self.redis_url},
            )  # fmt: skip
            return True

    def progress(self) -> Progress | None:
        """None where none was started."""
        with self._lock:
            if self._process is None or self._output is None:
                return None
            code = self._process.poll()
            if code is not None and not self._ended:
                self._ended = time.monotonic()
            length = os.fstat(self._output.fileno()).st_size
            said = os.pread(self._output.fileno(), TAIL, max(0, length - TAIL)).decode(errors="replace")
            passed = (self._ended or time.monotonic()) - self._started
            return Progress(self._target, self._command, passed, said.strip(), code)

    def wait(self) -> None:
        """Until the one that runs has ended, if one does."""
        if self._process is not None:
            self._process.wait()


def obstacles(status: Mapping[str, Any]) -> list[str]:
    """Why no rollback can be started from here now, in sentences. status: `worker.operations.status.gather`'s."""
    found = []
    worker, server = status.get("worker") or {}, status.get("server") or {}
    if not status["redis"]["reachable"]:
        found.append("Redis cannot be reached.")
    if worker.get("state") not in (None, "none", "dead"):
        who = f"'{worker.get('name')}' (pid {worker.get('pid')} on {worker.get('host')})"
        found.append(f"The worker {who} is running: stop it first (Ctrl-C, or SIGTERM). It ends its batch.")
    if server.get("state") == "unreachable":
        found.append("The server cannot be reached from this machine: run the command where it runs.")
    if importlib.util.find_spec("torch") is None:
        found.append("This Python has no torch (only the dashboard is installed here): run the command where it is.")
    return found
