"""Killed workers and a restarted Redis: nothing lost, nothing trained twice. The workers are real processes."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import redis
from drain_parts import Lines, Weights, start
from patience import PATIENCE, until
from rq.utils import now

from producer import keys
from producer.client import Producer
from worker.consumer import commit, transitions
from worker.consumer.jobs import open_queue
from worker.consumer.redis_errors import retryable
from worker.testing.redis_server import RedisServer
from worker.versions import ledger

ROOT = Path(__file__).parents[2]
GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own, to be killed."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


class Process:
    """A worker process on the small step; its output is kept."""

    running: ClassVar[list["Process"]] = []

    def __init__(self, url: str, folder: Path, *options: str) -> None:
        self.log = (folder / "log").open("ab")
        arguments = [sys.executable, str(ROOT / "tests" / "helpers" / "drain_parts.py"), url, str(folder), *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(arguments, stdout=self.log, stderr=self.log, env=environment)
        Process.running.append(self)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def ended(self, timeout: float = PATIENCE) -> int:
        code = self.process.wait(timeout=timeout)
        self.log.close()
        return code


@pytest.fixture(autouse=True)
def no_worker_survives() -> Iterator[None]:
    yield
    while Process.running:
        Process.running.pop().kill()


def test_workers_killed_at_random_lose_nothing_and_train_nothing_twice(redis_url: str, folder: Path) -> None:
    connection, producer = redis.Redis.from_url(redis_url), Producer(redis_url)
    ids: list[str] = []
    dice, kills, weights = random.Random(7), 0, Weights(folder)
    # What a kill hits is chance, and depends on the machine: kills go on until each kind has happened.
    met = ("put back", "in the weights but not in Redis")  # before an update; between weights and Redis
    while kills < 12 or not all(kind in (folder / "log").read_text() for kind in met):
        assert kills < 200, "no kill fell before an update, or none between weights and Redis"
        for _ in range(32 if ids else 100):
            ids.append(producer.enqueue(GOOD, id=f"t{len(ids)}").id)
        worker = Process(redis_url, folder)
        version = weights.header["version"]
        until(lambda v=version, w=worker: weights.header["version"] > v or w.process.poll() is not None, "a version")
        time.sleep(dice.uniform(0, 0.12))  # a batch takes about this long
        worker.kill()
        kills += 1
    last = Process(redis_url, folder, "--burst")
    assert last.ended() == 0, (folder / "log").read_text()[-3000:]
    assert sorted(weights.trained) == sorted(ids)
    assert set(ledger.versions(connection, ids)) == set(ids)
    assert producer.version() == weights.header["version"]
    assert {producer.status(i).state for i in ids} == {"finished"}
    assert all(producer.status(i).version for i in ids)
    # Redis' ledger and the versions' manifests tell the same story as the weights.
    story = [entry[b"version"] for _, entry in connection.xrange(keys.EVENTS)]
    assert [int(version) for version in story] == list(range(1, weights.header["version"] + 1))


def test_a_kill_between_weights_and_redis_is_mended_at_the_next_start(redis_url: str, folder: Path) -> None:
    connection, producer, weights = redis.Redis.from_url(redis_url), Producer(redis_url), Weights(folder)
    ids = [producer.enqueue(GOOD, id=f"t{i}").id for i in range(5)]
    worker = start(connection, weights, hooks=[], max_jobs=5)
    trained = weights.run

    class Killed(BaseException):
        pass

    def dies(prepared):  # type: ignore[no-untyped-def]
        trained(prepared)
        raise Killed

    weights.run = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        worker.work(burst=True)
    assert (weights.header["version"], producer.version()) == (1, 0)
    weights.run = trained  # type: ignore[method-assign]
    connection.rpush(worker.queue.key, "t3")  # and one was put back already
    again = start(connection, weights, hooks=[])
    assert producer.version() == 1 and {producer.status(i).state for i in ids} == {"finished"}
    assert [producer.wait(i, timeout=PATIENCE) for i in ids] == [1] * 5
    again.work(burst=True)
    assert weights.trained == ids and producer.version() == 1
    assert connection.zcard(f"rq:wip:{keys.QUEUE}") == 0


def test_a_killed_worker_is_replaced_at_once(redis_url: str, folder: Path) -> None:
    connection, producer, weights = redis.Redis.from_url(redis_url), Producer(redis_url), Weights(folder)
    for i in range(40):
        producer.enqueue(GOOD, id=f"t{i}")
    worker = Process(redis_url, folder)
    until(lambda: weights.header["version"] >= 1, "the first version")
    worker.kill()
    assert connection.ttl(keys.WORKER_LOCK) > 0  # it had no time to give it back
    weights.untear()
    lines = Lines()
    start(connection, weights, hooks=[lines], name="next").work(burst=True)
    assert sorted(weights.trained) == sorted(f"t{i}" for i in range(40))


def test_sigterm_ends_a_worker_cleanly_and_a_second_changes_nothing(redis_url: str, folder: Path) -> None:
    producer, weights = Producer(redis_url), Weights(folder)
    for i in range(252):  # more than it trains until the signal arrives, and no multiple of a batch
        producer.enqueue(GOOD, id=f"t{i}")
    worker = Process(redis_url, folder)
    until(lambda: weights.header["version"] >= 1, "the first version")
    for _ in range(3):
        worker.process.send_signal(signal.SIGTERM)
    assert worker.ended() == 0
    header = weights.header
    assert header["state"] == "CLEAN" and header["version"] == producer.version()
    assert len(weights.trained) % 8 == 0 and 0 < len(weights.trained) < 252
    idle = Process(redis_url, folder)
    until(lambda: len(weights.trained) == 252, "all are trained")
    until(lambda: producer.version() == weights.header["version"], "the last version is committed")
    idle.process.send_signal(signal.SIGINT)
    assert idle.ended() == 0
    assert len(weights.trained) == 252


def test_a_redis_that_restarts_is_waited_for(server: RedisServer, folder: Path) -> None:
    weights = Weights(folder)
    ids = [Producer(server.url).enqueue(GOOD, id=f"t{i}").id for i in range(64)]
    worker = Process(server.url, folder, "--burst")

    def notices() -> list[str]:
        return re.findall("Redis does not serve this worker|Redis has not taken version", (folder / "log").read_text())

    for _ in range(2):
        # Two more than now: it has met the Redis that was started again, or it would still wait and say nothing anew.
        at = weights.header["version"] + 2
        until(lambda v=at: weights.header["version"] >= v or worker.process.poll() is not None, "the next version")
        before = len(notices())
        server.stop()  # an orderly restart: nothing written is lost
        until(lambda n=before: len(notices()) > n or worker.process.poll() is not None, "the worker misses Redis")
        server.start()
    assert worker.ended() == 0, (folder / "log").read_text()[-3000:]
    assert notices()
    assert sorted(weights.trained) == sorted(ids)
    producer = Producer(server.url)
    assert producer.version() == weights.header["version"] and {producer.status(i).state for i in ids} == {"finished"}


def test_a_redis_killed_before_it_hears_of_a_version_hears_of_it_once(
    server: RedisServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "STOP_GRACE", -1.0)  # which is for a worker that was asked to stop: this one was not
    weights, lines = Weights(folder), Lines()
    producer = Producer(server.url)
    ids = [producer.enqueue(GOOD, id=f"t{i}").id for i in range(3)]
    worker = start(redis.Redis.from_url(server.url), weights, hooks=[lines], heartbeat=60)
    run = weights.run

    def stops_redis(prepared):  # type: ignore[no-untyped-def]
        server.stop()
        return run(prepared)

    def on_notice(sentence: str) -> None:
        lines.notices.append(sentence)
        if "has not taken" in sentence:
            server.start()

    weights.run, lines.say = stops_redis, on_notice  # type: ignore[method-assign]
    worker.work(burst=True)
    assert weights.trained == ids and [producer.wait(i, timeout=PATIENCE) for i in ids] == [1, 1, 1]
    assert any("has not taken version 1" in notice for notice in lines.notices)


def test_a_worker_asked_to_stop_while_redis_is_away_leaves_the_commit_to_the_next(
    server: RedisServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "STOP_GRACE", 0.2)
    weights = Weights(folder)
    producer = Producer(server.url)
    producer.enqueue(GOOD, id="t0")
    connection = redis.Redis.from_url(server.url)
    worker = start(connection, weights, hooks=[], heartbeat=60)
    run = weights.run

    def stops_redis(prepared):  # type: ignore[no-untyped-def]
        server.stop()
        worker.request_stop(signal.SIGTERM, None)
        return run(prepared)

    weights.run = stops_redis  # type: ignore[method-assign]
    with pytest.raises(commit.CommitPendingError, match="version 1, which is in the weights"):
        worker.work()
    server.start()
    weights.run = run  # type: ignore[method-assign]
    connection.delete(keys.WORKER_LOCK)  # this process lives on and would count as the holder
    start(connection, weights, hooks=[]).work(burst=True)
    assert weights.trained == ["t0"] and producer.wait("t0", timeout=PATIENCE) == 1


def test_a_full_redis_is_waited_for(redis_url: str, folder: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(folder), Lines()
    ids = [Producer(redis_url).enqueue(GOOD, id=f"t{i}").id for i in range(6)]
    worker = start(connection, weights, hooks=[lines], max_jobs=3)
    run = weights.run

    def fills_up(prepared):  # type: ignore[no-untyped-def]
        connection.config_set("maxmemory", 1)
        return run(prepared)

    def on_notice(sentence: str) -> None:
        lines.notices.append(sentence)
        connection.config_set("maxmemory", 0)

    weights.run, lines.say = fills_up, on_notice  # type: ignore[method-assign]
    try:
        worker.work(burst=True)
    finally:
        connection.config_set("maxmemory", 0)
    assert sorted(weights.trained) == ids and "maxmemory" in lines.notices[0]


def gets_well(lines: Lines, mend: Callable[[], object]) -> None:
    """The first notice is somebody's sign to mend Redis."""

    def on_notice(sentence: str) -> None:
        lines.notices.append(sentence)
        mend()

    lines.say = on_notice  # type: ignore[method-assign]


def test_a_redis_full_before_jobs_are_taken_is_waited_for(server: RedisServer, folder: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(server.url), Weights(folder), Lines()
    ids = [Producer(server.url).enqueue(GOOD, id=f"t{i}").id for i in range(3)]

    def fills_up() -> None:
        connection.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            connection.set("another", "client")  # from here on Redis 6.2 refuses scripts as well, in words of their own

    lines.on_start = fills_up  # type: ignore[method-assign]
    gets_well(lines, lambda: connection.config_set("maxmemory", 0))
    worker = start(connection, weights, hooks=[lines], heartbeat=60)
    worker.last_cleaned_at = now()  # no maintenance first: it is the script that takes jobs that meets the full Redis
    worker.work(burst=True)
    assert weights.trained == ids and "maxmemory" in lines.notices[0]


def test_a_redis_whose_disk_is_full_is_waited_for(server: RedisServer, folder: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(server.url), Weights(folder), Lines()
    ids = [Producer(server.url).enqueue(GOOD, id=f"t{i}").id for i in range(3)]

    def snapshots_fail() -> None:
        (server.folder / "dump.rdb" / "in the way").mkdir(parents=True)  # a snapshot cannot take its name
        connection.config_set("save", "3600 1")
        connection.bgsave()
        until(lambda: connection.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot fails")

    lines.on_start = snapshots_fail  # type: ignore[method-assign]
    gets_well(lines, lambda: connection.config_set("save", ""))  # without snapshots none can have failed
    start(connection, weights, hooks=[lines], heartbeat=60).work(burst=True)
    assert weights.trained == ids and "MISCONF" in lines.notices[0] and "HSET" not in lines.notices[0]


def test_a_redis_lost_right_after_a_commit_costs_neither_count_nor_hook(server: RedisServer, folder: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(server.url), Weights(folder), Lines()
    producer = Producer(server.url)
    producer.enqueue([*GOOD[:1], {"role": "assistant", "content": "not finite"}], id="refused")
    producer.enqueue(GOOD, id="t0")
    worker = start(connection, weights, hooks=[lines], heartbeat=60)
    release = worker.batcher.release

    def loses_redis(settled):  # type: ignore[no-untyped-def]
        release(settled)
        if [held.id for held in settled] == ["t0"]:
            server.stop()

    worker.batcher.release = loses_redis  # type: ignore[method-assign]
    gets_well(lines, lambda: server.start())
    assert worker.work(burst=True) == 1
    assert [line["version"] for line in lines.versions] == [1]
    assert weights.trained == ["t0"] and weights.batches == [["refused", "t0"]]
    assert producer.status("refused").state == "failed" and "version 1 is committed, but" in lines.notices[0]


def test_a_script_that_meets_a_full_redis_is_tried_again(server: RedisServer) -> None:
    connection = redis.Redis.from_url(server.url)
    Producer(server.url).enqueue(GOOD, id="t0")
    queue = open_queue(connection)
    connection.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        connection.set("another", "client")
    with pytest.raises(redis.ResponseError) as caught:
        transitions.take(queue, 1, 0)
    assert "maxmemory" in str(caught.value) and retryable(caught.value)
    assert retryable(redis.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL."))
    assert not retryable(redis.ResponseError("WRONGTYPE Operation against a key"))
