"""A `tandem serve` as a child process, for the demo, tests and benchmarks: start, wait until it answers, stop.

Must not know: Redis.
Invariant: no process of the server outlives `stop`, nor this process.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from producer.errors import TandemError
from worker.utils.child_process import die_with_parent

START_SECONDS = 300.0
STOP_SECONDS = 30.0


class ServerFailedError(TandemError):
    """The server did not start; the message ends with the last lines of its log."""


class ServerProcess:
    """A running server: `url`, `run_dir`, `model_dir`, `log_path`, and `pid` of vLLM's API process."""

    def __init__(
        self,
        model_dir: Path | str,
        run_dir: Path | str,
        port: int | None = None,
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        wait: bool = True,
        command: Sequence[str] | None = None,
    ) -> None:
        """Start serving `model_dir` on 127.0.0.1:`port` (a free one if None) with vLLM's options `extra`.

        command: what to run in the place of `tandem serve MODEL_DIR`, with the same options.
        The log goes to run_dir/server.log. Returns once the server answers (`wait`), or raises ServerFailedError.
        """
        self.model_dir, self.run_dir = Path(model_dir), Path(run_dir)
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log_path = self.run_dir / "server.log"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        tandem = [sys.executable, "-P", "-m", "worker.cli", "serve", str(model_dir), "--run-dir", str(run_dir)]
        arguments = tandem if command is None else command
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*arguments, "--host", "127.0.0.1", "--port", str(port), *extra],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.pid = self._process.pid  # `tandem serve` becomes vLLM's API process by exec
        if wait:
            try:
                self.wait_ready()
            except BaseException:  # no `with` has been entered yet that would stop it
                self.stop()
                raise

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Return once /health answers 200. ServerFailedError when the process ends first, or after `timeout`
        seconds."""
        deadline = time.monotonic() + timeout
        while not self._healthy():
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                what = f"ended with exit code {code}" if code is not None else f"did not answer within {timeout:g} s"
                self.stop()
                raise ServerFailedError(
                    f"the server of {self.model_dir} {what}; its log {self.log_path} ends:\n{self.tail()}"
                )
            time.sleep(0.25)

    def alive(self) -> bool:
        """Whether the API process runs."""
        return self._process.poll() is None

    def tail(self, lines: int = 30) -> str:
        """The last lines of the server's log, of what was written since this start."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])

    def kill_api_process(self) -> None:
        """kill -9 of vLLM's API process alone, as an out-of-memory killer does: engine and worker are left behind."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int | None:
        """End the server as SIGTERM does, and by force what is left after a while; vLLM's exit code. Idempotent."""
        if self.alive():
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.pid, signal.SIGKILL)  # its own session: engine and worker too
        except ProcessLookupError:
            pass
        self._process.wait()
        return self._process.returncode

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
