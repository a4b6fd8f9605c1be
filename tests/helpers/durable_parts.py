"""What the tests of durability share: Redis, a server (the stand-in or real vLLM), `tandem` commands on one folder.

Commands run in forked processes that have torch imported (chaos_processes.py); what runs in them is the command line.
Weights are read from the server's memory, as a trainer would attach to it.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import redis
import torch
from chaos_processes import Forked, RealServer, run_stand_in, run_tandem
from patience import until
from stack_parts import transcripts

from producer import Producer, keys
from worker.checkpoint import replay
from worker.serving.control_client import server_state
from worker.shared_weights.attach import attach
from worker.testing.redis_server import RedisServer

LEARNING = ["--lr", "3e-4", "--max-length", "512", "--threads", "1", "--linger", "0"]
HASTY_LEASE = 3.0
QUIET = ["--no-checkpoint-at-stop", "--checkpoint-every", "1000"]

__all__ = ["LEARNING", "QUIET", "Site", "transcripts"]


def run_hasty_tandem(*arguments: str) -> None:
    """`tandem ...` in this process, whose leases on the weights are `HASTY_LEASE` seconds long."""
    from worker.serving import protocol

    protocol.LEAST_LEASE, protocol.LEASE_FACTOR = HASTY_LEASE, 0.0
    run_tandem(*arguments)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class Site:
    """One folder with everything; each part may be killed and started again."""

    def __init__(
        self, folder: Path, model: Path, *, real: bool = False, requests: int = 0, optimizer: str = "apollo-mini"
    ) -> None:
        """requests: how many the stand-in says are running. optimizer: what it is started for."""
        self.folder, self.model = folder, model
        self.state = folder / "state"
        self.run_dir = folder / "run"
        self.extra: dict[str, str] = {}
        """More environment of commands."""
        self.store = RedisServer(folder / "redis").start()
        self.redis = redis.Redis.from_url(self.store.url)
        self.producer = Producer(self.store.url)
        self.real, self.requests, self.optimizer = real, requests, optimizer
        self.server: Any = self.start_server()

    def start_server(self) -> Any:
        if self.real:
            self.server = RealServer(self.model, self.run_dir, self.folder / "server.log", self.optimizer)
            return self.server
        environment = {"STAND_IN_REQUESTS": str(self.requests), "TANDEM_OPTIMIZER": self.optimizer}
        folders = (str(self.model), str(self.run_dir))
        self.server = Forked(run_stand_in, folders, environment, self.folder / "server.log")
        until(lambda: "ready" in self.server.said(), "the stand-in is ready")
        return self.server

    def restart_server(self) -> None:
        self.server.kill()
        self.start_server()

    def recover(self, *, from_journal: bool = False) -> None:
        """A new server, which a worker brings back to the live version; from_journal: without any checkpoint."""
        if from_journal:
            shutil.rmtree(self.state / "checkpoints")
        self.restart_server()
        self.work(*QUIET)

    def close(self) -> None:
        self.server.kill()
        self.store.stop()

    def start(
        self, *arguments: str, fault: str | None = None, run: Any = run_tandem, log: str = "tandem.log"
    ) -> Forked:
        environment = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.run_dir), "TANDEM_FAULT": fault or ""}
        environment |= {"TANDEM_STATE_DIR": str(self.state)} | self.extra
        return Forked(run, arguments, environment, self.folder / log)

    def tandem(self, *arguments: str, code: int = 0, log: str = "tandem.log") -> str:
        """A command to its end, which must be `code`; what it said. log: one of its own, where others are running."""
        process = self.start(*arguments, log=log)
        assert process.ended() == code, process.said()
        return process.said()

    def work(self, *options: str, jobs: int = 2, code: int = 0) -> str:
        """`tandem worker --burst` to its end."""
        return self.tandem("worker", "--until-empty", "--max-jobs", str(jobs), *LEARNING, *options, code=code)

    def killed(self, fault: str, *options: str, jobs: int = 2) -> str:
        """A worker that dies at `fault`."""
        process = self.start("worker", "--until-empty", "--max-jobs", str(jobs), *LEARNING, *options, fault=fault)
        assert process.ended() == -signal.SIGKILL, process.said()
        return process.said()

    def stopped(self, fault: str, *options: str, jobs: int = 2) -> Forked:
        """A worker with short leases that is stopped (SIGSTOP) at `fault`, and hangs there."""
        arguments = ("worker", "--burst", "--max-jobs", str(jobs), *LEARNING, *options)
        process = self.start(*arguments, fault=f"{fault}:stop", run=run_hasty_tandem)
        until(lambda: _is_stopped(process.pid) or not process.alive(), f"the worker is stopped at {fault}")
        assert process.alive(), process.said()
        return process

    def send(self, prefix: str, count: int) -> list[str]:
        sent = transcripts(prefix, count)
        self.producer.enqueue_many(sent)
        return [item["id"] for item in sent]

    def digest(self) -> str:
        """Of the weights as they are served."""
        return replay.digest(attach(self.run_dir).tensors)

    def everything(self) -> tuple[str, int]:
        """Digest of weights and optimizer's state, and the step count."""
        weights = attach(self.run_dir)
        step = int(weights.state[:64].view(torch.int64)[1])
        return replay.digest(weights.tensors | {"state": weights.state}), step

    def header(self) -> dict[str, Any]:
        return dict(attach(self.run_dir).header.fields())

    def served(self) -> dict[str, Any]:
        return server_state(self.run_dir)

    def is_torn(self) -> None:
        """The server has noticed that its trainer died, and what it left."""
        until(lambda: self.served()["state"] == "torn", "the server is torn")

    def ledger(self) -> dict[str, int]:
        return {key.decode(): int(value) for key, value in self.redis.hgetall(keys.LEDGER).items()}

    def manifest(self, version: int) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.redis.hgetall(keys.manifest(version)).items()}

    def trained(self) -> list[str]:
        """Ids of all manifests, in order: one that occurs twice was trained twice."""
        versions = range(1, self.producer.version() + 1)
        return [id for version in versions for id in json.loads(self.manifest(version).get("jobs", "[]"))]

    def agree(self) -> int:
        """Header, server, Redis and ledger tell one story; the version."""
        header, served, version = self.header(), self.served(), self.producer.version()
        assert header["state"] == "CLEAN" and served["state"] == "serving"
        assert header["version"] == served["version"] == version
        lineage = self.redis.hget(keys.STATE, "lineage").decode()
        assert header["lineage"] == served["lineage"] == lineage
        return version
