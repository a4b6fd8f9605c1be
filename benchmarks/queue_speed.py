"""The queue alone, with a step that does nothing: jobs a second and Redis round trips a job, against RQ's SimpleWorker.

    python benchmarks/queue_speed.py                         one interleaved run, medians; table, queue.json, queue.png
    python benchmarks/queue_speed.py --ledger 1000000        memory of a ledger of a million ids
    python benchmarks/queue_speed.py --latency --redis URL   enqueue to published version on a running stack, in parts

Both sides get the same jobs (1 KB transcripts, msgpack, results kept) on the same private Redis (appendonly, everysec),
client and server on this machine. Timed from the end of a worker's start to the beginning of its end.
"""

import json
import logging
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import outputs
import redis
from redis.connection import AbstractConnection
from rich.console import Console
from rich.table import Table
from rq import Queue
from rq.worker import SimpleWorker

from producer import keys
from producer.client import Producer
from producer.serializer import MsgpackSerializer
from producer.transcript import Transcript
from worker.config.protocol import JobResult, Update
from worker.consumer.batch_worker import BatchWorker
from worker.consumer.events import Hooks
from worker.testing.redis_server import RedisServer
from worker.versions import ledger

HERE = Path(__file__).parent
MESSAGES = [{"role": "user", "content": "q" * 400}, {"role": "assistant", "content": "a" * 600}]
console = Console(width=100)


class RoundTrips:
    """Counts what this process sends to Redis: a command or a pipeline is one send, and waits for one answer."""

    count = 0

    @classmethod
    def watch(cls) -> None:
        send = AbstractConnection.send_packed_command

        def counted(self: AbstractConnection, *args: Any, **kwargs: Any) -> Any:
            cls.count += 1
            return send(self, *args, **kwargs)

        AbstractConnection.send_packed_command = counted  # type: ignore[method-assign]


class Timed:
    """Mixed into a worker: when it was ready, and when it had nothing left to do."""

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        super().bootstrap(*args, **kwargs)  # type: ignore[misc]
        self.ready, self.sent, self.busy = time.perf_counter(), RoundTrips.count, time.process_time()

    def teardown(self) -> None:
        self.seconds = time.perf_counter() - self.ready
        self.cpu = time.process_time() - self.busy
        self.trips = RoundTrips.count - self.sent
        super().teardown()  # type: ignore[misc]


class TimedSimple(Timed, SimpleWorker):
    """RQ's own worker without forking, its fastest."""


class TimedBatch(Timed, BatchWorker):
    """Ours."""


class Ready:
    tokens = 1

    def __init__(self, job_id: str) -> None:
        self.id = job_id


class Nothing:
    """A step that trains nothing and answers at once."""

    version = 0

    def prepare(self, job_id: str, transcript: Transcript) -> Ready:
        return Ready(job_id)

    def run(self, prepared: Sequence[Ready]) -> Update:
        self.version += 1
        results = {ready.id: JobResult(self.version) for ready in prepared}
        return Update(self.version, "benchmark", {"tokens": len(prepared), "loss": 0.0}, results)


def simple(connection: redis.Redis, jobs: int) -> Timed:
    """`jobs` no-ops (len of the transcript) through RQ's SimpleWorker."""
    queue = Queue("plain", connection=connection, serializer=MsgpackSerializer)
    data = [
        Queue.prepare_data(
            "builtins.len", ({"messages": MESSAGES},), description="transcript", result_ttl=keys.RESULT_TTL
        )
        for _ in range(jobs)
    ]
    queue.enqueue_many(data)
    worker = TimedSimple([queue], connection=connection, serializer=MsgpackSerializer, log_job_description=False)
    worker.work(burst=True, logging_level="WARNING")
    assert len(queue.finished_job_registry) == jobs
    return worker


def ours(batch: int) -> Callable[[redis.Redis, int], Timed]:
    """The same through BatchWorker, `batch` jobs a version."""

    def run(connection: redis.Redis, jobs: int) -> Timed:
        producer = Producer(_url)
        producer.enqueue_many({"messages": MESSAGES} for _ in range(jobs))
        worker = TimedBatch(connection, Nothing(), max_jobs=batch, linger=0.0, hooks=[Hooks()])
        worker.work(burst=True)
        assert connection.hlen(keys.LEDGER) == jobs == len(worker.queue.finished_job_registry)
        return worker

    return run


_url = ""


def measure(jobs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Every contender once a round, in turn; per contender the medians over rounds.

    The ratio to SimpleWorker is taken within each round: both then met the same load from the machine's other work.
    """
    global _url
    contenders = {"RQ SimpleWorker": simple} | {f"Tandem, batch {n}": ours(n) for n in (1, 8, 32)}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    trips: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    RoundTrips.watch()
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as server:
        _url = server.url
        connection = redis.Redis.from_url(server.url)
        for turn in range(rounds + 1):  # the first is a warm-up
            for name, contender in contenders.items():
                connection.flushall()
                worker = contender(connection, jobs)
                if turn:
                    rates[name].append(jobs / worker.seconds)
                    trips[name].append(worker.trips / jobs)
                    cpu[name].append(1000 * worker.cpu / jobs)

    def ratio(name: str) -> float:
        pairs = zip(rates[name], rates["RQ SimpleWorker"], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    return {
        name: {
            "jobs_per_s": statistics.median(rates[name]),
            "lowest": min(rates[name]),
            "highest": max(rates[name]),
            "times_simple_worker": ratio(name),
            "worker_cpu_ms_per_job": statistics.median(cpu[name]),
            "round_trips_per_job": statistics.median(trips[name]),
        }
        for name in contenders
    }


def show(found: dict[str, dict[str, float]], folder: Path, jobs: int, rounds: int) -> None:
    """The table, queue.json and queue.png."""
    table = Table(title=f"No-op jobs of 1 KB, {jobs} a round, median of {rounds} interleaved rounds")
    for column in ("worker", "jobs/s", "lowest-highest", "x SimpleWorker", "CPU ms a job", "trips a job"):
        table.add_column(column, justify="left" if column == "worker" else "right", no_wrap=True)
    for name, row in found.items():
        spread = f"{row['lowest']:,.0f}-{row['highest']:,.0f}"
        numbers = [f"{row[key]:.2f}" for key in ("times_simple_worker", "worker_cpu_ms_per_job", "round_trips_per_job")]
        table.add_row(name, f"{row['jobs_per_s']:,.0f}", spread, *numbers)
    console.print(table)
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "jobs": jobs, "rounds": rounds}
    about["at"] = time.strftime("%Y-%m-%d", time.gmtime())
    (folder / "queue.json").write_text(json.dumps({"about": about, "results": found}, indent=2) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = [name.replace("Tandem, ", "") for name in found]
    shown = ("jobs_per_s", "jobs a second", "{:,.0f}"), ("round_trips_per_job", "Redis round trips a job", "{:.2f}")
    for axis, (field, title, form) in zip(axes, shown, strict=True):
        bars = axis.bar(names, [row[field] for row in found.values()], color=["#999999", *["#3b6ea5"] * 3])
        axis.bar_label(bars, fmt=form)
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "queue.png", dpi=130)
    console.print(f"written: {folder / 'queue.json'}, {folder / 'queue.png'}")


def ledger_size(ids: int) -> None:
    """Memory and disk of a ledger of `ids` random ids of 36 characters."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as server:
        connection = redis.Redis.from_url(server.url)
        before = connection.info("memory")["used_memory"]
        for first in range(0, ids, 10_000):
            names = (str(uuid.uuid4()) for _ in range(min(10_000, ids - first)))
            connection.hset(keys.LEDGER, mapping=dict.fromkeys(names, first // 32))
        grown = connection.info("memory")["used_memory"] - before
        started = time.perf_counter()
        for _ in range(1000):
            connection.hget(keys.LEDGER, str(uuid.uuid4()))
        looked_up = (time.perf_counter() - started) / 1000
        connection.bgrewriteaof()
        while connection.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.2)
        disk = connection.info("persistence")["aof_current_size"]
        version = connection.info("server")["redis_version"]
    console.print(
        f"{ids:,} ids: {grown / 1e6:.0f} MB of memory ({grown / ids:.0f} bytes an id), {disk / 1e6:.0f} MB on disk,"
        f" a look-up with its round trip {looked_up * 1e6:.0f} us (Redis {version})"
    )


PARTS = ("linger_s", "tokenize_s", "step_s", "pause_s", "commit_s")


def latency(redis_url: str, samples: int) -> dict[str, list[float]]:
    """On a running stack at low load: one transcript at a time, from `enqueue` until `wait` has its version.

    Prints medians in ms: the whole, and its parts as the worker noted them. The pause lies inside the step; what is
    left over is queueing, RQ's bookkeeping and the client's own round trips.
    """
    producer, connection = Producer(redis_url), redis.Redis.from_url(redis_url)
    times: dict[str, list[float]] = {name: [] for name in ("whole", *PARTS, "left over")}
    for _ in range(samples):
        started = time.perf_counter()
        version = producer.wait(producer.enqueue(MESSAGES).id, timeout=600)
        whole = time.perf_counter() - started
        time.sleep(0.5)  # low load; and the worker's note of the commit's own time comes after the commit
        noted = ledger.manifest(connection, version)
        commit = connection.hget(keys.STATE, "commit_s")
        parts = {name: float(noted.get(name, "nan")) for name in PARTS} | {"commit_s": float(commit or "nan")}
        times["whole"].append(whole)
        for name in PARTS:
            times[name].append(parts[name])
        times["left over"].append(whole - sum(parts[name] for name in PARTS if name != "pause_s"))
    table = Table(title=f"Enqueue to published version at low load, ms, {samples} transcripts one at a time")
    for column in ("part", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in times.items():
        label = {"pause_s": "  of which pause"}.get(name, name.removesuffix("_s"))
        table.add_row(label, *(f"{1000 * f(seconds):,.1f}" for f in (statistics.median, min, max)))
    console.print(table)
    return times


@click.command()
@click.option("--jobs", default=640, help="Jobs a round.")
@click.option("--rounds", default=11, help="Rounds, after one that only warms up.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE, help="Folder of queue.json and queue.png.")
@click.option("--ledger", "ids", type=int, help="Measure the memory of a ledger with as many ids instead.")
@click.option("--latency", "samples", is_flag=False, flag_value=20, type=int, help="Measure a running stack instead.")
@click.option("--redis", "redis_url", envvar="REDIS_URL", help="The running stack's Redis, for --latency.")
def main(jobs: int, rounds: int, out: Path, ids: int | None, samples: int | None, redis_url: str | None) -> None:
    """Measure the queue by itself."""
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    if ids:
        ledger_size(ids)
    elif samples:
        latency(redis_url or "redis://127.0.0.1:6379/0", samples)
    else:
        outputs.folder(out)
        show(measure(jobs, rounds), out, jobs, rounds)


if __name__ == "__main__":
    main()
