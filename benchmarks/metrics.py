"""What metrics cost the worker: a version's events, a scrape, and a look at Redis, disk and server.

    python benchmarks/metrics.py --repeat 200

Starts a Redis with a queue of jobs, finished jobs and evaluations as a busy deployment has them. No server runs: that
it cannot be reached is part of a look. Milliseconds, p50 and p90; and a version of a tiny model, to compare.
"""

import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import redis

from producer import Producer, keys
from worker.operations.worker_metrics import WorkerMetrics
from worker.testing.redis_server import RedisServer
from worker.utils.metrics import KINDS, PARTS
from worker.versions import evaluations
from worker.versions.evaluations import Score

LINE: dict[str, Any] = {f"{part}_s": 0.1 for part in PARTS} | {
    "version": 7, "lineage": "a" * 32, "jobs": 32, "tokens": 9000, "trained_tokens": 3000, "loss": 1.0,
    "update_ratio": 1e-4, "serving_cost_s": 0.1, "kinds": {kind: {"jobs": 5, "loss": 1.0} for kind in KINDS},
}  # fmt: skip


def fill(store: RedisServer, jobs: int) -> None:
    """A queue of `jobs` transcripts, a ledger, and a hundred evaluations of each of three sets."""
    with Producer(store.url) as producer:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        producer.enqueue_many([{"id": f"t{number}", "messages": turns} for number in range(jobs)])
    with redis.Redis.from_url(store.url) as client:
        client.hset(keys.LEDGER, mapping={f"old-{number}": number for number in range(100_000)})
        client.hset(keys.STATE, mapping={"lineage": "a" * 32, "at": "2026-01-01T00:00:00Z"})
        for name in ("facts", "tone", "tools"):
            for version in range(evaluations.VERSIONS):
                found = evaluations.evaluation(name, version, "a" * 32, "d", [Score(1.0, 2)], "live")
                evaluations.keep(client, found)


def milliseconds(what: Callable[[], object], repeat: int) -> str:
    took = []
    for _ in range(repeat):
        started = time.perf_counter()
        what()
        took.append(1000 * (time.perf_counter() - started))
    return f"p50 {statistics.median(took):.3f} ms, p90 {sorted(took)[int(0.9 * len(took))]:.3f} ms"


@click.command()
@click.option("--repeat", type=click.IntRange(10), default=200)
@click.option("--jobs", type=click.IntRange(1), default=5000)
def main(repeat: int, jobs: int) -> None:
    """Print what each costs."""
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as store:
        fill(store, jobs)
        state = Path(folder) / "state"
        for name in ("journal", "checkpoints"):
            (state / name).mkdir(parents=True)
        metrics = WorkerMetrics(store.url, Path(folder) / "run")
        metrics.began(7, state)
        with metrics.serving("127.0.0.1", 0) as url:
            urllib.request.urlopen(url).read()
            print("a version's events:", milliseconds(lambda: metrics.on_version(LINE), repeat))
            print("a look:            ", milliseconds(metrics.look, repeat // 5))
            print("a scrape:          ", milliseconds(lambda: urllib.request.urlopen(url).read(), repeat))


if __name__ == "__main__":
    main()
