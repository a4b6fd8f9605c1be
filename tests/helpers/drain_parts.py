"""A small real step for the drain's tests: its "weights" are a file of job ids, with the header beside them.

    python tests/helpers/drain_parts.py REDIS_URL FOLDER [--new-lineage] [--burst]    runs a worker on it

It keeps the contract of worker/config/protocol.py: the record is complete before APPLYING; CLEAN and the new version
come last.
What a transcript's last message says decides what happens to it: see `Weights.prepare` and `Weights.run`.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry

from producer import keys
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from producer.transcript import Transcript
from worker.config.protocol import JobResult, TornWeightsError, UnavailableError, Update
from worker.consumer.batch_worker import BatchWorker
from worker.consumer.events import Hooks, Notice
from worker.consumer.jobs import FeedbackJob
from worker.consumer.log_lines import sentence
from worker.consumer.settlement import settle_with_rq
from worker.consumer.worker_lock import WorkerLock
from worker.versions.reconcile import reconcile


@dataclass(frozen=True)
class Ready:
    id: str
    tokens: int
    says: str


class Weights:
    """A step whose header and weights outlive the process, as shared memory does."""

    def __init__(self, folder: Path, pace: float = 0.0) -> None:
        self.folder = folder
        self.pace = pace
        self.batches: list[list[str]] = []
        if not (folder / "header").exists():
            self.set_header("a" * 32, 0, "CLEAN")

    @property
    def header(self) -> dict[str, Any]:
        return json.loads((self.folder / "header").read_text())

    def set_header(self, lineage: str, version: int, state: str) -> None:
        self._replace("header", json.dumps({"lineage": lineage, "version": version, "state": state}))

    def _replace(self, name: str, text: str) -> None:
        (self.folder / f"{name}.new").write_text(text)
        os.replace(self.folder / f"{name}.new", self.folder / name)

    @property
    def record(self) -> dict[str, Any] | None:
        path = self.folder / "record"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def trained(self) -> list[str]:
        """Every job id the weights contain, once per time it was trained."""
        path = self.folder / "weights"
        return path.read_text().split() if path.exists() else []

    def prepare(self, job_id: str, transcript: Transcript) -> Ready:
        says = transcript.messages[-1]["content"]
        if says == "unpreparable":
            raise TandemError("this transcript cannot be prepared")
        if says == "breaks prepare":
            raise RuntimeError("tokenizer bug")
        if says.startswith("quoted while preparing"):
            raise KeyError(says)
        if says == "hangs prepare":
            while True:
                pass
        tokens = int(says.split()[1]) if says.startswith("tokens ") else 10
        return Ready(job_id, tokens, says)

    def run(self, prepared: Sequence[Ready]) -> Update:
        says = {ready.says for ready in prepared}
        self.batches.append([ready.id for ready in prepared])
        if "breaks the step" in says:
            raise RuntimeError("one of these breaks the step")
        for text in sorted(says):
            if text.startswith("quoted while training"):
                raise UnicodeEncodeError("ascii", text, 0, 1, f"cannot encode {text}")
        if "refused on purpose" in says:
            raise TandemError("the step refuses this batch")
        if "server gone" in says:
            raise UnavailableError("the server is gone")
        header = self.header
        good = [ready for ready in prepared if ready.says != "not finite"]
        rejected = {ready.id: "loss is not finite" for ready in prepared if ready.says == "not finite"}
        if not good:
            return Update(None, header["lineage"], rejected=rejected)
        version = header["version"] + 1
        manifest = {"tokens": sum(ready.tokens for ready in good), "loss": 1.5}
        manifest |= {"update_rms": 2e-6, "weight_rms": 0.02}
        results = {ready.id: JobResult(version) for ready in good}
        update = Update(version, header["lineage"], manifest, results, rejected)
        self._replace("record", json.dumps(update.record().plain()))
        time.sleep(self.pace)
        self.set_header(header["lineage"], header["version"], "APPLYING")
        if "tears" in says:
            raise TornWeightsError("broke off while writing the weights")
        # One os.replace stands for "the last write and CLEAN": a kill before it leaves the weights without the batch.
        self._replace("weights", " ".join([*self.trained, *results]))
        self.set_header(header["lineage"], version, "CLEAN")
        if "stops" in says:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.pace)
        return update

    def untear(self) -> None:
        """What recovery will do one day: these weights are replaced whole, so APPLYING means old or new, never half."""
        header, record = self.header, self.record
        if header["state"] == "APPLYING" and record is not None:
            applied = set(record["jobs"]) <= set(self.trained)
            self.set_header(header["lineage"], record["version"] if applied else header["version"], "CLEAN")


class Lines(Hooks):
    """Collects what a worker tells."""

    def __init__(self) -> None:
        self.versions: list[dict[str, Any]] = []
        self.notices: list[str] = []
        self.rejected: dict[str, str] = {}

    def on_version(self, line: dict[str, Any]) -> None:
        self.versions.append(line)

    def on_notice(self, notice: Notice) -> None:
        self.say(sentence(notice))

    def say(self, text: str) -> None:
        self.notices.append(text)

    def on_rejected(self, job_id: str, reason: str) -> None:
        self.rejected[job_id] = reason


def start(connection: redis.Redis, weights: Weights, *, new_lineage: bool = False, **options: Any) -> BatchWorker:
    """Lock, reconcile, worker: the order of `tandem worker`."""
    name = options.pop("name", f"test-{os.getpid()}")
    lock = WorkerLock(connection, name)
    lock.acquire()
    try:
        for sentence in reconcile(
            connection,
            weights.header,
            weights.record,
            new_lineage=new_lineage,
            adopt=lambda lineage, version: weights.set_header(lineage, version, "CLEAN"),
            settle=settle_with_rq(connection),
        ):
            logging.info(sentence)
    except BaseException:
        lock.release()
        raise
    return BatchWorker(connection, weights, name=name, lock=lock, **options)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]


def job(connection: redis.Redis, job_id: str) -> Job:
    return FeedbackJob.fetch(job_id, connection=connection, serializer=MsgpackSerializer)


def counts(connection: redis.Redis) -> dict[str, int]:
    kinds = {"failed": FailedJobRegistry, "finished": FinishedJobRegistry, "started": StartedJobRegistry}
    found = {name: kind(keys.QUEUE, connection=connection).get_job_count(cleanup=False) for name, kind in kinds.items()}
    return found | {"queued": Queue(keys.QUEUE, connection=connection).count}


def drain(connection: redis.Redis, weights: Weights, **options: object) -> Lines:
    lines = Lines()
    start(connection, weights, hooks=[lines], **({"linger": 0.0} | options)).work(burst=True)
    return lines


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    weights = Weights(Path(sys.argv[2]), pace=0.02)
    weights.untear()
    worker = start(
        redis.Redis.from_url(sys.argv[1]),
        weights,
        new_lineage="--new-lineage" in sys.argv,
        max_jobs=8,
        linger=0.05,
        heartbeat=0.5,
    )
    worker.work(burst="--burst" in sys.argv)


def events(connection: redis.Redis) -> list[str]:
    """The kinds of the entries of `weights:events`, oldest first."""
    return [entry[b"kind"].decode() for _, entry in connection.xrange(keys.EVENTS)]
