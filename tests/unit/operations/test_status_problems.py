"""What the operator is told: a worker that works, died or starts, parts that disagree, ages."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Weights, start

from producer.client import Producer
from worker.cli.status import replicas_line
from worker.consumer.worker_lock import WorkerLock
from worker.operations import status
from worker.versions import replica_status

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]


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
    replicas = {"count": 3, "present": {0: 4, 2: 4}, "unequal": 0, "lost": 1}
    found = status.problems(base | {"server": serving, "replicas": replicas})
    assert len(found) == 1 and "1 of 3 replicas are not there (1)" in found[0]
    assert "`tandem worker --replica 1/3 --run-dir DIRECTORY`" in found[0]
    gone = base | {"server": serving, "replicas": replicas, "worker": {"state": "none"}}
    assert status.problems(gone) == [
        "no worker is running: start `tandem worker --replica 0/3 --run-dir DIRECTORY` with that of its server"
    ]
    found = status.problems(base | {"server": serving, "replicas": replicas | {"count": 1, "unequal": 2}})
    assert len(found) == 1 and "digest unequal, 2 times" in found[0]
    assert "refuses to serve: half" in status.problems(base | {"server": {"state": "torn", "reason": "half"}})[0]


def test_a_rank_that_waits_for_a_slow_one_is_not_accused() -> None:
    serving = {"state": "serving", "version": 4, "lineage": "L"}
    worker = {"state": "busy", "name": "w", "pid": 1}
    base = {"redis": {}, "version": 4, "lineage": "L", "worker": worker, "server": serving}
    first = {"rank": 1, "pid": 11, "seconds": 9.0, "doing": "sleeps"}

    def found(second: str) -> list[str]:
        return status.problems(base | {"waiting": [first, {"rank": 2, "pid": 12, "seconds": 9.0, "doing": second}]})

    assert found("computes") == []
    assert [one[:6] for one in found("sleeps")] == ["rank 1", "rank 2"]
    assert [one[:6] for one in found("is stopped")] == ["rank 1", "rank 2"]


def test_replicas_are_listed_by_version_and_who_is_missing_is_said() -> None:
    replicas = {"count": 4, "present": {0: 12, 3: 11, 1: 12}, "unequal": 1, "lost": 3}
    assert replicas_line(replicas) == "0, 1 at version 12; 3 at version 11; 2 not there; lost 3 times, unequal once"
    well = {"count": 2, "present": {0: 1, 1: 1}, "unequal": 0, "lost": 0}
    assert replicas_line(well) == "0, 1 at version 1"


def test_what_redis_says_of_replicas_is_read_within_bounds() -> None:
    """Nobody counts to what a hand wrote there."""
    said = {"count": 3, "present": {"0": 4, "2": 4, "-1": 4, "3": 4, "99": 4}, "unequal": 0, "lost": 1}
    found = replica_status.read({"replicas": json.dumps(said)})
    assert found is not None and found.present == {0: 4, 2: 4} and found.count == 3
    for count in (10**12, 65, 1, 0, -2, "many", None, [2], 1e400):
        assert replica_status.read({"replicas": json.dumps(said | {"count": count})}) is None
    for text in ("", "[]", "{", "3", "[" * 100_000, '{"count": 2, "present": [1], "unequal": 0, "lost": 0}'):
        assert replica_status.read({"replicas": text}) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s ago"), (3.2, "3 s ago"), (300, "5 min ago"), (7300, "2 h ago"), (1e6, "12 days ago")],
)
def test_ages_read_well(seconds: float, text: str) -> None:
    assert status.ago_text(seconds) == text
