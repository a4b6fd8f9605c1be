"""The processes of a crash test: Redis, a server (the stand-in, or real vLLM) and real `tandem worker` processes.

Worker and stand-in are forked from a process that has imported torch and transformers already (multiprocessing's fork
server), so that a restart costs a second instead of eight; what runs in them is what the command line runs. Whatever
dies here dies of SIGKILL.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import redis
from patience import PATIENCE, TimedOut, until

from worker.shared_weights.weights_client import read_header
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess
from worker.utils.fault_injection import UPDATE_POINTS
from worker.utils.unix_socket import WireError

TESTS = Path(__file__).parents[1]
WARM = ["chaos_warm"]
"""What the fork server imports before its first fork."""
LEARNING = ("--lr", "3e-4", "--max-length", "1024", "--threads", "1")


def _forker() -> Any:
    """The fork server's context. It finds our modules by PYTHONPATH, as any process started here does."""
    ours = [str(TESTS.parent), str(TESTS / "chaos"), str(TESTS / "helpers")]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*ours, *paths]))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


class Forked:
    """`function(*arguments)` in a process of its own, with `environment` and its output appended to `log`."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
        log.touch()
        self.log, self._begin = log, log.stat().st_size
        self.started = time.monotonic()
        work = (function, arguments, environment, str(log))
        self._process = _forker().Process(target=_become, args=work, daemon=True)
        self._process.start()
        self.pid = int(self._process.pid)

    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def kill(self) -> None:
        """kill -9, and wait until it is gone. Nothing happens to a process that is dead already."""
        self._process.kill()
        self._process.join()

    def ended(self, timeout: float = PATIENCE) -> int:
        """Its exit code (negative: the signal); TimedOut if it goes on."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimedOut(f"process {self.pid} did not end in {timeout:g} s; it said:\n{self.said()[-3000:]}")
        return int(self._process.exitcode)

    def said(self) -> str:
        """Its output so far."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")


def _become(function: Any, arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    """In the new process: its environment, its output, death with its parent; then the work."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)
    function(*arguments)


def run_tandem(*arguments: str) -> None:
    """`tandem ...` in this process; TANDEM_FAULT of this process counts, not of the one it was forked from."""
    from worker.cli import main
    from worker.utils import fault_injection

    fault_injection.arm(os.environ.get("TANDEM_FAULT"))
    sys.argv = ["tandem", *arguments]
    main.main()


def run_stand_in(model: str, run_dir: str) -> None:
    import stand_in

    stand_in.main(Path(model), Path(run_dir))


def run_divided_stand_in(model: str, run_dir: str, ranks: str) -> None:
    import divided_stand_in

    divided_stand_in.main(Path(model), Path(run_dir), int(ranks))


class Server(Protocol):
    """What serves the weights."""

    def alive(self) -> bool:
        """Whether it runs."""

    def kill(self) -> None:
        """kill -9 of all its processes."""


class StandIn(Forked):
    """The stand-in, ready to be attached to."""

    def __init__(self, model: Path, run_dir: Path, log: Path) -> None:
        super().__init__(run_stand_in, (str(model), str(run_dir)), {"TANDEM_RUN_DIR": str(run_dir)}, log)
        until(lambda: "ready" in self.said() or not self.alive(), "the stand-in to be ready")
        if not self.alive():
            raise TimedOut(f"the stand-in did not start:\n{self.said()[-3000:]}")


class RealServer:
    """vLLM, answering."""

    def __init__(
        self,
        model: Path,
        run_dir: Path,
        log: Path,
        optimizer: str = "apollo-mini",
        extra: Sequence[str] = ("--max-model-len", "4096", "--max-num-seqs", "4"),
        environment: dict[str, str] | None = None,
    ) -> None:
        options = [*extra, "--optimizer", optimizer]
        self.process = ServerProcess(model, run_dir, extra=options, env=environment)

    def alive(self) -> bool:
        return self.process.alive()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stop()


class Cluster:
    """All of it in `folder`. `tandem worker` gets `options` besides those of every worker here.

    replicas: 2: there is a second server, with a worker that follows. Whoever starts a worker finds, as the dice say,
    that server fresh, or that worker dead or about to die. rolling: their servers pause in turn.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        real: bool = False,
        options: tuple[str, ...] = (),
        replicas: int = 1,
        rolling: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.options = folder, model, options
        self.run_dir = folder / "run"
        self._server_class: Any = RealServer if real else StandIn
        self.store = RedisServer(folder / "redis").start()
        self.redis = redis.Redis.from_url(self.store.url)
        self.server: Server | None = None
        self.worker: Forked | None = None
        self.starts = 0
        self.replicas, self.other_dir = replicas, folder / "run-1"
        self._in_turn = ("--rolling",) if rolling else ()
        self.other_server: Server | None = None
        self.follower: Forked | None = None
        self._port = _free_port()

    def ensure_follower(self, dice: random.Random | None) -> str:
        """The second server and its worker run; dice: what befalls them before, or later. What was done."""
        if dice is not None and dice.random() < 0.15 and self.other_server is not None:
            self.other_server.kill()
        if self.other_server is None or not self.other_server.alive():
            self.other_server = self._server_class(self.model, self.other_dir, self.folder / "server-1.log")
            if self.follower is not None:
                self.follower.kill()
        fault = dice.choice(UPDATE_POINTS[:-1]) if dice is not None and dice.random() < 0.4 else None
        if self.follower is not None and self.follower.alive() and (dice is None or dice.random() < 0.6):
            return "replica 1 goes on"
        if self.follower is not None:
            self.follower.kill()
        own = ["--replica", "1/2", "--run-dir", str(self.other_dir), "--state-dir", str(self.folder / "state-1")]
        arguments = ("worker", *LEARNING, *self.options, *own, "--rendezvous", f"127.0.0.1:{self._port}")
        self.follower = Forked(run_tandem, arguments, {"TANDEM_FAULT": fault or ""}, self.folder / "worker-1.log")
        return f"replica 1 started{f', to die at {fault}' if fault else ''}"

    def ensure_server(self) -> None:
        """Start the server unless it runs."""
        if self.server is None or not self.server.alive():
            self.server = self._server_class(self.model, self.run_dir, self.folder / "server.log")

    def header(self, run_dir: Path | None = None) -> dict[str, Any] | None:
        """The header beside the weights (of the first server, or of `run_dir`'s); None when no server runs."""
        try:
            return read_header(run_dir or self.run_dir)
        except WireError:
            return None

    def start_worker(self, *more: str, fault: str | None = None) -> Forked:
        """A `tandem worker` in the background."""
        assert self.worker is None or not self.worker.alive(), "one worker at a time"
        self.starts += 1
        if self.replicas > 1:
            meeting = ("--replica", "0/2", "--rendezvous", f"127.0.0.1:{self._port}", "--replica-wait", "5")
            more = (*meeting, *self._in_turn, *more)
        self.worker = self.start_command("worker", *LEARNING, *self.options, *more, fault=fault)
        return self.worker

    def start_command(self, *arguments: str, fault: str | None = None) -> Forked:
        """`tandem ...` in the background."""
        environment = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.run_dir), "TANDEM_FAULT": fault or ""}
        environment["TANDEM_STATE_DIR"] = str(self.folder / "state")
        return Forked(run_tandem, arguments, environment, self.folder / "worker.log")

    def kill_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()

    def kill_server(self) -> None:
        if self.server is not None:
            self.server.kill()

    def restart_redis(self, pause: float = 0.0) -> None:
        """kill -9 Redis, and start it again on its own files after `pause` seconds."""
        self.store.kill()
        time.sleep(pause)
        self.store.start()

    def close(self) -> None:
        self.kill_worker()
        self.kill_server()
        for process in (self.follower, self.other_server):
            if process is not None:
                process.kill()
        self.store.stop()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
