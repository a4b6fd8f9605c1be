"""A site on GPUs whose server divides its weights: `tandem` commands are processes of their own, since what has looked
for a GPU cannot be forked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from divided_parts import DividedSite
from durable_parts import LEARNING
from patience import PATIENCE, TimedOut
from server_options import SERVER_OPTIONS

from worker.testing.server_process import ServerProcess
from worker.utils.child_process import die_with_parent

ROOT = Path(__file__).parents[2]


class Command:
    """`tandem ARGUMENTS` as a process; as `chaos_processes.Forked`."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
        log.touch()
        self.log, self._begin, self.started = log, log.stat().st_size, time.monotonic()
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *arguments], env=os.environ | environment, cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.pid = self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ended(self, timeout: float = PATIENCE) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"it did not end in {timeout:g} s; it said:\n{self.said()[-3000:]}") from None

    def said(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")


class Served:
    """vLLM over two GPUs, answering."""

    def __init__(self, model: Path, run_dir: Path, optimizer: str) -> None:
        options = [*SERVER_OPTIONS, "--enforce-eager", "--tensor-parallel-size", "2", "--optimizer", optimizer]
        self.process = ServerProcess(model, run_dir, extra=options)
        self.url = self.process.url

    def alive(self) -> bool:
        return self.process.alive()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stop()


class GpuSite(DividedSite):
    """Two ranks, each on a GPU."""

    def start_server(self) -> Any:
        self.server = Served(self.model, self.run_dir, self.optimizer)
        return self.server

    def start(self, *arguments: str, fault: str | None = None, rank_fault: str = "", **options: Any) -> Any:
        environment = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.run_dir), "TANDEM_FAULT": fault or ""}
        environment |= {"TANDEM_STATE_DIR": str(self.state), "TANDEM_FAULT_RANK_1": rank_fault}
        return Command(arguments, environment, self.folder / str(options.get("log", "tandem.log")))

    def work(self, *options: str, jobs: int = 4, code: int = 0) -> str:
        arguments = ("worker", "--until-empty", "--max-jobs", str(jobs), *LEARNING, "--max-tokens", "512")
        return self.tandem(*arguments, *options, code=code)
