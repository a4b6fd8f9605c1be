"""The ledger's one transaction, and the worker lock, against a real Redis."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import redis
from patience import until
from redis.client import Pipeline

from producer import keys
from worker.config.version_record import VersionRecord
from worker.consumer import worker_lock
from worker.consumer.worker_lock import LockLostError, WorkerBusyError, WorkerLock
from worker.versions import ledger


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def record(version: int, *jobs: str, lineage: str = "L", **manifest: Any) -> VersionRecord:
    results = {job: {"version": version} for job in jobs}
    return VersionRecord(version, lineage, list(jobs), manifest, results)


def everything(connection: redis.Redis) -> dict[bytes, bytes]:
    return {key: connection.dump(key) for key in connection.keys("*")}


def test_a_commit_says_everything_at_once(connection: redis.Redis) -> None:
    assert ledger.commit(connection, record(1, "a", "b", loss=0.5, tokens=7, deep={"x": [1, None]}))
    assert connection.get(keys.VERSION) == b"1"
    assert connection.hgetall(keys.LEDGER) == {b"a": b"1", b"b": b"1"}
    manifest = ledger.manifest(connection, 1)
    assert (
        manifest["jobs"] == '["a","b"]'
        and manifest["loss"] == "0.5"
        and json.loads(manifest["deep"]) == {"x": [1, None]}
    )
    ((_, event),) = connection.xrange(keys.EVENTS)
    state = connection.hgetall(keys.STATE)
    for said in (event, state):
        assert (said[b"version"], said[b"lineage"], said[b"jobs"], said[b"tokens"]) == (b"1", b"L", b"2", b"7")
    assert ledger.state(connection) == ledger.LedgerState(1, "L")
    assert ledger.versions(connection, ["b", "zzz", "a"]) == {"b": 1, "a": 1}


def test_a_rollback_says_who_was_dropped_and_who_is_trained_again(connection: redis.Redis) -> None:
    ledger.commit(connection, record(1, "a", "b"))
    connection.hdel(keys.LEDGER, "b")  # a rollback queued it again, and this one goes back on that
    ledger.commit(connection, record(2, kind="rollback", dropped=["a"], retaken=["b"]))
    assert ledger.dropped(connection) == {"a": 2}
    assert ledger.everyone(connection) == {"a": 1, "b": 2}


def test_a_version_that_somebody_sets_in_between_is_not_overwritten(connection: redis.Redis) -> None:
    calls: list[int] = []

    def settle(pipe: Pipeline) -> None:
        calls.append(1)
        if len(calls) == 1:
            connection.set(keys.VERSION, 7)

    with pytest.raises(ledger.LedgerMismatchError, match="Redis is at 7"):
        ledger.commit(connection, record(1, "a"), settle)
    assert connection.get(keys.VERSION) == b"7" and ledger.everyone(connection) == {}


def test_the_same_record_again_changes_nothing(connection: redis.Redis) -> None:
    calls: list[int] = []
    ledger.commit(connection, record(1, "a"), lambda pipe: calls.append(1))
    before = everything(connection)
    assert ledger.commit(connection, record(1, "a"), lambda pipe: calls.append(1)) is False
    assert everything(connection) == before and calls == [1]


@pytest.mark.parametrize(
    ("there", "then", "says"),
    [
        ([], record(2, "a"), "at version 2 and Redis is at 0"),
        ([record(1, "a"), record(2, "b")], record(2, "c"), "at version 2 and Redis is at 2"),
        ([record(1, "a")], record(2, "b", lineage="M"), "lineage L, the server's are M"),
        ([record(1, "a")], record(1, "a", lineage="M"), "at version 1 and Redis is at 1"),
    ],
)
def test_what_does_not_follow_is_refused_and_leaves_no_trace(
    connection: redis.Redis, there: list[dict[str, Any]], then: dict[str, Any], says: str
) -> None:
    for earlier in there:
        ledger.commit(connection, earlier)
    before = everything(connection)
    with pytest.raises(ledger.LedgerMismatchError, match=says):
        ledger.commit(connection, then, lambda pipe: pytest.fail("settled"))
    assert everything(connection) == before


def test_a_run_without_redis_is_taken_over_whole(connection: redis.Redis) -> None:
    ledger.commit(connection, record(1, "a"))
    ledger.commit(connection, record(9, base=1))
    assert ledger.state(connection).version == 9
    with pytest.raises(ledger.LedgerMismatchError):
        ledger.commit(connection, record(12, base=8))


def test_a_change_of_a_watched_key_starts_the_transaction_anew(connection: redis.Redis) -> None:
    calls = 0

    def settle(pipe: Pipeline) -> None:
        nonlocal calls
        calls += 1
        pipe.set("settled", calls)
        if calls < 3:
            connection.sadd("dependents", calls)

    ledger.commit(connection, record(1, "a"), settle, watch=["dependents"])
    assert calls == 3 and connection.get("settled") == b"3" and connection.xlen(keys.EVENTS) == 1


def test_two_committers_of_one_version_cannot_both_win(connection: redis.Redis) -> None:
    def rival(pipe: Pipeline) -> None:
        if ledger.state(connection).version == 0:
            ledger.commit(connection, record(1, "theirs"))

    with pytest.raises(ledger.LedgerMismatchError):
        ledger.commit(connection, record(1, "ours"), rival)
    assert connection.hgetall(keys.LEDGER) == {b"theirs": b"1"} and connection.xlen(keys.EVENTS) == 1


def test_an_answer_lost_after_exec_is_settled_by_reading_back(connection: redis.Redis, redis_url: str) -> None:
    class LosesAnswer(redis.Redis):
        lost = 0

        def pipeline(self, *args: Any, **kwargs: Any) -> Pipeline:
            pipe = super().pipeline(*args, **kwargs)
            execute = pipe.execute

            def once(**options: Any) -> Any:
                committing = any(command[0][0] == "XADD" for command in pipe.command_stack)
                answer = execute(**options)
                if committing and not self.lost:
                    LosesAnswer.lost += 1
                    raise redis.ConnectionError("connection lost before the answer was read")
                return answer

            pipe.execute = once  # type: ignore[method-assign]
            return pipe

    unlucky = LosesAnswer.from_url(redis_url)
    with pytest.raises(redis.ConnectionError):
        ledger.commit(unlucky, record(1, "a"))
    assert ledger.commit(unlucky, record(1, "a")) is False
    assert connection.xlen(keys.EVENTS) == 1 and connection.get(keys.VERSION) == b"1"


def test_a_redis_that_refuses_writes_commits_nothing(connection: redis.Redis) -> None:
    connection.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.RedisError):
            ledger.commit(connection, record(1, "a"))
    finally:
        connection.config_set("maxmemory", 0)
    assert everything(connection) == {}


def test_one_jobs_broken_keys_do_not_undo_the_version(connection: redis.Redis) -> None:
    connection.set("rq:results:a", "not a stream")
    assert ledger.commit(connection, record(1, "a"), lambda pipe: pipe.xadd("rq:results:a", {"x": 1}))
    assert ledger.state(connection).version == 1


def test_a_ledger_of_a_wrong_type_is_an_error(connection: redis.Redis) -> None:
    connection.set(keys.LEDGER, "not a hash")
    with pytest.raises(ledger.LedgerMismatchError, match="only in part"):
        ledger.commit(connection, record(1, "a"))


def test_a_version_that_is_no_number_is_named(connection: redis.Redis) -> None:
    connection.set(keys.VERSION, "seven")
    with pytest.raises(ledger.LedgerMismatchError, match="holds b'seven'"):
        ledger.state(connection)


def test_the_lock_is_one_workers_until_it_gives_it_back(connection: redis.Redis) -> None:
    first, second = WorkerLock(connection, "first"), WorkerLock(connection, "second")
    assert first.acquire() is None
    with pytest.raises(WorkerBusyError, match=rf"'first' \(pid {os.getpid()}"):
        second.acquire()
    second.release()
    assert connection.exists(keys.WORKER_LOCK)
    first.release()
    assert second.acquire() is None


def test_the_lock_of_a_dead_process_is_taken_over(connection: redis.Redis, redis_url: str) -> None:
    code = (
        "import os, redis, sys; from worker.consumer.worker_lock import WorkerLock\n"
        "WorkerLock(redis.Redis.from_url(sys.argv[1]), 'gone').acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, redis_url], check=False)
    assert "'gone'" in (WorkerLock(connection, "next").acquire() or "")


@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": None}, {"birth": None, "pid": "x"}])
def test_a_lock_whose_holder_cannot_be_seen_is_respected(connection: redis.Redis, change: dict[str, Any]) -> None:
    holder = json.loads(WorkerLock(connection, "far").value) | {"pid": 2**22 + 1, "birth": "1"} | change
    connection.set(keys.WORKER_LOCK, json.dumps(holder))
    with pytest.raises(WorkerBusyError):
        WorkerLock(connection, "near").acquire()


def test_a_recycled_pid_is_not_the_holder(connection: redis.Redis) -> None:
    holder = json.loads(WorkerLock(connection, "old").value) | {"birth": "1"}  # our own pid, born at another time
    connection.set(keys.WORKER_LOCK, json.dumps(holder))
    assert "'old'" in (WorkerLock(connection, "new").acquire() or "")


def test_renewal_takes_an_expired_lock_again_but_not_anothers(connection: redis.Redis) -> None:
    lock = WorkerLock(connection, "mine", ttl=30)
    lock.acquire()
    connection.delete(keys.WORKER_LOCK)
    lock.renew()
    assert connection.get(keys.WORKER_LOCK) == lock.value and 25 < connection.ttl(keys.WORKER_LOCK) <= 30
    connection.set(keys.WORKER_LOCK, WorkerLock(connection, "theirs").value)
    with pytest.raises(LockLostError, match="'theirs'"):
        lock.renew()
    lock.release()
    assert b"theirs" in connection.get(keys.WORKER_LOCK)


def manifests(connection: redis.Redis) -> list[int]:
    return sorted(int(key.rsplit(b":")[-1]) for key in connection.keys("weights:manifest:*"))


def test_manifests_beyond_the_history_are_trimmed(connection: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(1, 31):
        ledger.commit(connection, record(version, f"job-{version}"))  # as before there was a limit
    assert manifests(connection) == list(range(1, 31))
    monkeypatch.setattr(ledger, "TRIMMED_AT_ONCE", 20)
    ledger.commit(connection, record(31, "a"), history=3)
    assert manifests(connection) == list(range(21, 32)), "as many as one commit may"
    for version in range(32, 40):
        ledger.commit(connection, record(version, "b"), history=3)
        assert manifests(connection)[-4:] == list(range(version - 3, version + 1))
    assert manifests(connection) == [36, 37, 38, 39] and len(connection.hgetall(keys.LEDGER)) == 32
    assert ledger.commit(connection, record(39, "b"), history=3) is False, "committed again, nothing is counted twice"
    ledger.commit(connection, record(40, "c"), history=0)
    assert manifests(connection) == [40], "the newest one always stays"
    ledger.commit(connection, record(41, "d"))
    assert manifests(connection) == [40, 41], "who does not know the history trims nothing"


def test_a_history_that_grows_again_deletes_nothing_in_it(connection: redis.Redis) -> None:
    for version in range(1, 11):
        ledger.commit(connection, record(version, "a"), history=2)
    for version in range(11, 15):
        ledger.commit(connection, record(version, "a"), history=10)
    assert manifests(connection) == list(range(8, 15))


def test_a_lock_that_another_took_is_not_released(connection: redis.Redis) -> None:
    lock = WorkerLock(connection, "slow")
    lock.acquire()
    connection.set(keys.WORKER_LOCK, '{"name": "next", "pid": 1}')
    lock.release()
    assert b"next" in connection.get(keys.WORKER_LOCK)


def test_a_lock_is_renewed_during_work_that_takes_longer_than_it_lasts(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_lock, "BEATS", 600)
    lock = WorkerLock(connection, "rollback")
    with lock:  # `tandem rollback`, which makes a version again for minutes
        connection.delete(keys.WORKER_LOCK)  # as it expires
        until(lambda: connection.get(keys.WORKER_LOCK) == lock.value, "be the lock's holder again")
    assert not connection.exists(keys.WORKER_LOCK)
    lock.acquire()
    with lock.kept():  # `tandem worker`, which opens its session
        connection.delete(keys.WORKER_LOCK)
        until(lambda: connection.get(keys.WORKER_LOCK) == lock.value, "be the lock's holder again")
    with lock.kept():
        connection.set(keys.WORKER_LOCK, WorkerLock(connection, "other").value)
    with pytest.raises(LockLostError, match="'other'"):
        lock.renew()


class Between(redis.Redis):
    """`act` happens between the first GET of a transaction and its EXEC."""

    act: Callable[[], object]

    def pipeline(self, *args: Any, **named: Any) -> Any:
        pipe = super().pipeline(*args, **named)
        get = pipe.get

        def late(name: str) -> Any:
            found = get(name)
            pipe.get = get
            self.act()
            return found

        pipe.get = late
        return pipe


@pytest.mark.parametrize("first", ["renew", "release"])
def test_a_heartbeat_beside_the_release_does_not_keep_the_lock(connection: redis.Redis, first: str) -> None:
    lock, disturbed = WorkerLock(connection, "ends"), Between(connection_pool=connection.connection_pool)
    lock.acquire()

    def other() -> None:
        lock.connection = connection
        if first == "renew":
            lock.release()
        else:
            connection.set(keys.WORKER_LOCK, lock.value)

    lock.connection, disturbed.act = disturbed, other
    getattr(lock, first)()
    assert not connection.exists(keys.WORKER_LOCK)
