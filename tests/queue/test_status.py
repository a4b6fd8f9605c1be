"""`tandem status` as a user calls it, with parts up, down and dead."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from drain_parts import Weights, start

from producer.client import Producer
from worker.cli import status
from worker.consumer.worker_lock import WorkerLock

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]


def run(redis_url: str, run_dir: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(status.command, ["--redis", redis_url, "--run-dir", str(run_dir), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def as_json(redis_url: str, run_dir: Path) -> dict[str, Any]:
    return json.loads(run(redis_url, run_dir, "--json")[1])


def test_an_empty_redis_without_worker_and_server(redis_url: str, tmp_path: Path) -> None:
    code, text = run(redis_url, tmp_path)
    first = text.splitlines()[0]
    assert code == 1 and (
        first == "version 0 · 0 queued, 0 in hand, 0 failed · worker none · eviction noeviction · server unreachable"
    )
    assert "start `tandem worker`" in text and "server cannot be reached" in text


def test_what_was_trained_is_reported(redis_url: str, tmp_path: Path) -> None:
    producer, connection = Producer(redis_url), redis.Redis.from_url(redis_url)
    for i in range(3):
        producer.enqueue(GOOD, id=f"t{i}")
    start(connection, Weights(tmp_path), hooks=[], max_jobs=2, linger=0).work(max_versions=1)
    found = as_json(redis_url, tmp_path)
    assert (found["version"], found["lineage"]) == (1, "a" * 32)
    assert found["queue"] == {"queued": 1, "started": 0, "failed": 0, "finished": 2, "scheduled": 0, "deferred": 0}
    update = found["last_update"]
    assert (update["jobs"], update["tokens"], update["loss"]) == (2, 20, 1.5)
    assert update["update_ratio"] == pytest.approx(1e-4) and "update_ratio 0.0001" in run(redis_url, tmp_path)[1]
    assert 0 <= update["age_s"] < 60 and update["commit_s"] > 0 and update["step_s"] >= 0
    assert (
        "version 1, " in run(redis_url, tmp_path)[1]
        and "(2 jobs, 20 tokens, loss 1.5000)" in run(redis_url, tmp_path)[1]
    )


def test_a_worker_is_seen_while_it_works_and_when_it_died(redis_url: str, tmp_path: Path) -> None:
    connection, weights = redis.Redis.from_url(redis_url), Weights(tmp_path)
    Producer(redis_url).enqueue(GOOD, id="t0")
    seen: list[dict[str, Any]] = []
    trained = weights.run

    def look(prepared):  # type: ignore[no-untyped-def]
        seen.append(status.gather(redis_url, tmp_path)["worker"])
        return trained(prepared)

    weights.run = look  # type: ignore[method-assign]
    start(connection, weights, hooks=[], name="the-worker").work(burst=True)
    assert seen[0]["state"] == "busy" and seen[0]["name"] == "the-worker" and seen[0]["silent_s"] < 60
    code = (
        "import os, redis, sys; from worker.consumer.worker_lock import WorkerLock\n"
        "WorkerLock(redis.Redis.from_url(sys.argv[1]), 'late').acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, redis_url], check=False)
    found = status.gather(redis_url, tmp_path)
    assert found["worker"]["state"] == "dead" and any("'late'" in problem for problem in found["problems"])
    lock = WorkerLock(connection, "early")
    lock.acquire()
    assert status.gather(redis_url, tmp_path)["worker"]["state"] == "starting"
    lock.release()


BROKEN = [
    "redis://:hunter2/x@h",
    "redis://:hunter2@h:port/0",
    "redis://127.0.0.1:1/0?socket_timeout=hunter2",
    "nonsense",
]


@pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "unix://:hunter2@/nowhere/redis.sock", *BROKEN])
def test_a_redis_that_is_down_is_said_to_be_without_its_password(url: str, tmp_path: Path) -> None:
    code, text = run(url, tmp_path)
    assert code == 1 and text.startswith("Redis unreachable · server unreachable") and "hunter2" not in text
    assert as_json(url, tmp_path)["redis"]["reachable"] is False


def test_a_state_nobody_of_us_wrote_is_reported_not_raised(redis_url: str, tmp_path: Path) -> None:
    connection = redis.Redis.from_url(redis_url)
    connection.set("weights:version", "many")
    assert "Redis unreadable" in run(redis_url, tmp_path)[1]
    connection.set("weights:version", 3)
    connection.hset("weights:state", mapping={"at": "yesterday", "loss": "low", "lineage": b"\xff"})
    code, text = run(redis_url, tmp_path)
    assert code == 1 and text


def test_disagreement_between_server_and_redis_is_a_problem() -> None:
    base = {
        "redis": {"url": "x", "reachable": True},
        "version": 4,
        "lineage": "L",
        "worker": {"state": "idle", "name": "w", "pid": 1},
    }
    serving = {"state": "serving", "version": 4, "lineage": "L"}
    assert status.problems(base | {"server": serving}) == []
    assert "at version 5, Redis at 4" in status.problems(base | {"server": serving | {"version": 5}})[0]
    assert "another lineage" in status.problems(base | {"server": serving | {"lineage": "M", "version": 0}})[0]
    assert "refuses to serve: half" in status.problems(base | {"server": {"state": "torn", "reason": "half"}})[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s ago"), (3.2, "3 s ago"), (300, "5 min ago"), (7300, "2 h ago"), (1e6, "12 days ago")],
)
def test_ages_read_well(seconds: float, text: str) -> None:
    assert status.ago_text(seconds) == text
