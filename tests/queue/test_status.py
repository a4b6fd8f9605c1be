"""`tandem status` as a user calls it, with parts up, down and dead."""

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from drain_parts import Weights, start

from producer.client import Producer
from worker.cli import status

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
    assert f"start `tandem worker --run-dir {tmp_path}`" in text and "server cannot be reached" in text


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
