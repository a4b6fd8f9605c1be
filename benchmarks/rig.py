"""Redis, a server and `tandem worker` processes for a benchmark, on one folder; they end with its script.

Must not know: what is measured. Invariant: nothing it started outlives `close`, nor this process.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import torch

from producer import Producer
from producer.errors import TandemError
from worker.serving.launch import entry_module, is_cpu_build
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess
from worker.utils.child_process import die_with_parent
from worker.versions import ledger

ROOT = Path(__file__).resolve().parent.parent
PLAIN_PATH = [f"{ROOT}/benchmarks/plain_server", str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
"""Where a server without Tandem on a CPU finds modules besides."""

CLOSING = 45.0
"""Seconds of `--until` that are kept for ending what was started."""


def server_options(
    length: int, trainer_memory: float | None, more: Sequence[str] = (), clients: int = 16, qwen: bool = True
) -> list[str]:
    """vLLM's: random weights, for `clients` at a time; on a GPU the GB that the trainer is to find (None: what `tandem
    serve` thinks). qwen: of Qwen3.5 the text model, with the kernels that fit an offline Hopper."""
    options = ["--load-format", "dummy", "--max-model-len", str(length), "--max-num-seqs", str(clients)]
    if qwen:
        options += ["--language-model-only"]
    if torch.cuda.is_available():
        options += ["--gdn-prefill-backend", "triton"] if qwen else []
        options += ["--trainer-memory", str(trainer_memory)] if trainer_memory else []
    return [*options, *more]


def metrics(url: str) -> list[str]:
    """What the server at `url` says of itself, line by line."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return list(answer.read().decode().splitlines())


def metric(url: str, name: str) -> float:
    """The sum of vLLM's counter `name` over its labels; 0 where it is not there."""
    lines = metrics(url)
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def visible_card(number: int) -> str:
    """What CUDA_VISIBLE_DEVICES must say for GPU `number` of those that this process sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[number].strip() if seen else str(number)


class RigError(TandemError):
    """A process did not do what was waited for; the message ends with what it said."""


class Rig:
    """`run_dir` and `url` of a server that is there, or start_server(); Redis is a private one unless `redis_url`.
    card: the GPU that server and workers see, counted among those that this process sees; None: all."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        run_dir: Path | None = None,
        url: str = "",
        redis_url: str | None = None,
        card: int | None = None,
    ) -> None:
        self.folder, self.model, self.url = folder, model, url
        self._card = {} if card is None else {"CUDA_VISIBLE_DEVICES": visible_card(card)}
        self.run_dir = run_dir or folder / "run"
        self.server: ServerProcess | None = None
        self._servers = 0
        self.store = None if redis_url else RedisServer(folder / "redis").start()
        self.redis_url = redis_url or (self.store.url if self.store else "")
        self.redis = redis.Redis.from_url(self.redis_url)
        self.producer = Producer(self.redis_url)
        self.workers: list[Worker] = []

    def start_server(
        self, options: Sequence[str], timeout: float = 300.0, plain: bool = False, wait: bool = True
    ) -> None:
        """`tandem serve`, or vLLM without Tandem (`plain`), with vLLM's `options`; returns once it answers, or (not
        `wait`) at once.

        In the place of the server before, and of all that was learnt on that.
        """
        if self.server is not None:
            self.server.stop()
            self._servers += 1
            self.redis.flushall()
        command = None
        if plain:
            on_cpu = is_cpu_build()
            command = [sys.executable, "-P", "-m", *entry_module(on_cpu, str(self.model))]
            options = [*options, *(["--dtype", "bfloat16", "--enforce-eager"] if on_cpu else [])]
        environment = dict(self._card)
        if plain and is_cpu_build():
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.pathsep.join(PLAIN_PATH)}
        self.server = ServerProcess(
            self.model, self.run_dir, extra=options, env=environment, wait=False, command=command
        )
        self.url = self.server.url
        if wait:
            self.server.wait_ready(timeout)

    @contextmanager
    def worker(self, *options: str, fault: str | None = None, ready: float = 300.0) -> Iterator["Worker"]:
        """A `tandem worker` that is ready (within `ready` seconds); stopped, or killed, at the end of the block."""
        worker = self.start_worker(*options, fault=fault)
        try:
            worker.until("be ready", lambda: "worker ready" in worker.said(), ready)
            worker.ready_s = time.monotonic() - worker.started
            yield worker
        finally:
            worker.stop()

    def start_worker(self, *options: str, fault: str | None = None) -> "Worker":
        environment = os.environ | self._card | {"REDIS_URL": self.redis_url, "TANDEM_RUN_DIR": str(self.run_dir)}
        environment |= {"TANDEM_STATE_DIR": str(self.folder / f"state-{self._servers}")}
        environment |= {"TANDEM_FAULT": fault} if fault else {}
        worker = Worker(options, environment, self.folder / f"worker-{len(self.workers)}.log")
        self.workers.append(worker)
        return worker

    def manifest(self, version: int) -> dict[str, float]:
        """The numbers in a version's manifest."""
        numbers = {}
        for name, text in ledger.manifest(self.redis, version).items():
            try:
                numbers[name] = float(text)
            except (TypeError, ValueError):
                continue
        return numbers

    def version(self, texts: Sequence[Any], timeout: float = 240.0) -> dict[str, float]:
        """One version of all of `texts`: its manifest's numbers, and `step_s`, seconds from begin to CLEAN."""
        versions = {self.producer.wait(one.id, timeout) for one in self.producer.enqueue_many(texts)}
        if len(versions) != 1:
            raise RigError(f"{len(texts)} transcripts became {len(versions)} versions: a longer --linger is needed")
        row = self.manifest(versions.pop())
        waited = row.get("journal_s", 0.0) + row.get("wait_for_pause_s", 0.0)
        return row | {"step_s": row["gradients_s"] + waited + row["pause_s"]}

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> tuple[int, dict[str, Any]]:
        """(status, body) of a request to the server."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps({"model": str(self.model)} | body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        if self.server is not None:
            self.server.stop()
        if self.store is not None:
            self.store.stop()


class Worker:
    """A `tandem worker` process. `ready_s`: seconds from its start until it took jobs."""

    def __init__(self, options: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log, self.started, self.ready_s = log, time.monotonic(), float("nan")
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "worker", *options],
                env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=ROOT,
                preexec_fn=die_with_parent,
            )  # fmt: skip
        self.pid = self._process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, what: str, done: Callable[[], bool], timeout: float) -> None:
        """Wait for `done()`. RigError when the process ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not done():
            if (code := self._process.poll()) is not None:
                raise RigError(f"the worker ended with {code} before it could {what}:\n{self.said()[-4000:]}")
            if time.monotonic() > deadline:
                raise RigError(f"the worker did not {what} within {timeout:g} s:\n{self.said()[-4000:]}")
            time.sleep(0.05)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ended(self, timeout: float) -> int:
        """Its exit code. RigError after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RigError(f"the worker did not end within {timeout:g} s:\n{self.said()[-4000:]}") from None

    def stop(self, patience: float = 60.0) -> None:
        """As an operator would; by force after `patience` seconds. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """kill -9. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
