"""What somebody who can only write to Redis gets: nothing. Each attack fails alone, the good jobs around it train."""

import contextlib
import functools
import os
import pickle
import resource
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from drain_parts import Lines, Weights, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.registry import FailedJobRegistry

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.consumer.jobs import FeedbackJob, open_queue
from worker.versions import ledger

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
CANARY = "tandem-attack-canary"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def call(function: Any = keys.FUNCTION, instance: Any = None, args: Any = None, kwargs: Any = None) -> bytes:
    return msgpack.packb([function, instance, [{"messages": GOOD}] if args is None else args, kwargs or {}])


def nested(depth: int, inner: bytes) -> bytes:
    return b"\x91" * depth + inner


@functools.cache
def bomb() -> bytes:
    """A quarter of a gigabyte, in a quarter of a megabyte."""
    return zlib.compress(bytes(2**28))


def attacks(canary: str) -> dict[str, dict[str, bytes]]:
    """Job id -> the fields of its hash."""
    callback = {"data": zlib.compress(call())}
    fields = {
        "os-system": {"data": zlib.compress(call("os.system", args=[f"touch {canary}"]))},
        "builtins": {"data": zlib.compress(call("builtins.exec", args=[f"open({canary!r}, 'w')"]))},
        "near-name": {"data": zlib.compress(call("worker.train.__init__"))},
        "no-function": {"data": zlib.compress(call(None))},
        "list-function": {"data": zlib.compress(call(["worker.train"]))},
        "instance": {"data": zlib.compress(call(instance={"a": 1}))},
        "on-success": callback | {"success_callback_name": b"os.abort"},
        "on-failure": {"data": b"\xc1"} | {"failure_callback_name": b"os.abort"},
        "on-stopped": callback | {"stopped_callback_name": b"os.abort"},
        "webhook": callback | {"webhooks": b'[{"url": "http://127.0.0.1:9/", "job_status": "failed"}]'},
        "pickle": {"data": zlib.compress(pickle.dumps(Touch(canary)))},
        "pickled-call": {"data": zlib.compress(pickle.dumps(("worker.train", None, (Touch(canary),), {})))},
        "pickled-all-over": {"data": pickle.dumps(Touch(canary)), "meta": pickle.dumps(Touch(canary))}
        | {"result": pickle.dumps(Touch(canary)), "exc_info": pickle.dumps(Touch(canary))},
        "bomb": {"data": bomb()},
        "bomb-in-bomb": {"data": zlib.compress(bomb())},
        "bomb-elsewhere": {"data": b"", "exc_info": bomb()},
        "larger-than-fetched": {"data": os.urandom(11 * 1024 * 1024)},
        "many-fields": {f"field{i}": b"x" for i in range(1000)} | {"data": zlib.compress(call())},
        "no-data": {"status": b"queued"},
        "empty": {"data": b""},
        "garbage": {"data": os.urandom(300)},
        "cut-short": {"data": zlib.compress(call())[:-9]},
        "deep": {"data": zlib.compress(nested(900, b"\xc0"))},
        "deeper": {"data": zlib.compress(nested(900_000, b"\xc0"))},
        "array-of-4-billion": {"data": zlib.compress(b"\xdd\xff\xff\xff\xff")},
        "arrays-of-a-million": {"data": zlib.compress(b"\xdd\x00\x0f\x42\x40" * 500 + b"\xc0" * 1_100_000)},
        "map-with-map-keys": {"data": zlib.compress(b"\x81\x80\xc0")},
        "time-before-time": {"data": zlib.compress(b"\xc7\x0c\xff" + b"\xff" * 12)},
        "five-parts": {"data": zlib.compress(msgpack.packb([keys.FUNCTION, None, [], {}, 1]))},
        "keywords": {"data": zlib.compress(call(kwargs={"lr": 1e9}))},
        "two-transcripts": {"data": zlib.compress(call(args=[{"messages": GOOD}, {"messages": GOOD}]))},
        "no-map": {"data": zlib.compress(call(args=["text"]))},
        "own-template": {
            "data": zlib.compress(call(args=[{"messages": GOOD, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}]))
        },
        "another-id": {"data": zlib.compress(call(args=[{"messages": GOOD, "id": "somebody-else"}]))},
        "no-number": callback | {"timeout": b"abc"},
        "no-status": callback | {"status": b"zzz"},
        "no-date": callback | {"created_at": b"yesterday"},
        "retries-no-list": callback | {"retries_left": b"2", "retry_intervals": b"5"},
        "retries-no-seconds": callback | {"retries_left": b"2", "retry_intervals": b'["x"]'},
        "retries-in-no-time": callback | {"retries_left": b"2", "retry_intervals": b"[1e300]"},
        "intervals-text": callback | {"retries_left": b"3", "retry_intervals": b'["a"]'},
        "intervals-huge": callback | {"retries_left": b"3", "retry_intervals": b"[1e300]"},
        "intervals-map": callback | {"retries_left": b"3", "retry_intervals": b"{}"},
        "intervals-many": callback | {"retries_left": b"3", "retry_intervals": str([1] * 1000).encode()},
        "slot": callback | {"rate_limit_key": b"k", "rate_limit_concurrency": b"1"},
        "repeats": callback | {"repeats_left": b"5", "repeat_intervals": b"[0]"},
    }
    return fields


SURVIVES = {
    "forever": {"result_ttl": b"-5"},
    "for-ages": {"result_ttl": b"9" * 18},
    "not-at-all": {"result_ttl": b"0"},
} | {
    "gone-at-once": {"ttl": b"-5"},
    "elsewhere": {"origin": b"another-queue"},
    "pickled-meta": {"meta": pickle.dumps(Touch(CANARY))},
    "elsewhere-no-text": {"origin": b"\xff\xfe"},
    "in-a-group": {"group_id": b"g"},
    "of-another-worker": {"worker_name": b"w"},
    "dependencies-no-json": {"dependency_ids": b"{"},
    "depends-on-5": {"dependency_ids": b"5"},
    "depends-on-map": {"dependency_ids": b'{"a": 1}'},
    "depends-on-no-text": {"dependency_ids": b'["\\ud800"]'},
    "depends-on-another": {"dependency_ids": b'["somebody-else"]'},
    "ever-again": {"retries_left": b"9" * 15, "retry_intervals": b"[0]"},
}
"""Odd, but a transcript: it trains, and nothing odd happens."""


def push(connection: redis.Redis, job_id: str | bytes, fields: dict[str, bytes] | None = None) -> None:
    if fields:
        connection.hset(f"rq:job:{job_id if isinstance(job_id, str) else job_id.decode()}", mapping=fields)
    connection.rpush(f"rq:queue:{keys.QUEUE}", job_id)


def test_every_attack_fails_alone_between_good_jobs(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    canary = str(tmp_path / CANARY)
    producer = Producer(redis_url)
    hostile = attacks(canary)
    good = []
    for job_id, fields in hostile.items():
        good.append(producer.enqueue(GOOD, id=f"before-{job_id}").id)
        push(connection, job_id, fields)
    for job_id, fields in SURVIVES.items():
        push(connection, job_id, {"data": zlib.compress(call())} | fields)
        good.append(job_id)
    good.append(producer.enqueue(GOOD, id="last").id)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start(connection, weights, hooks=[lines], max_jobs=32, linger=0).work(burst=True)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not Path(canary).exists() and not Path(CANARY).exists()
    assert sorted(weights.trained) == sorted(good)
    assert set(lines.rejected) == set(hostile)
    assert grown_kib < 200 * 1024, f"{grown_kib} KiB"
    failed = FailedJobRegistry(keys.QUEUE, connection=connection)
    assert sorted(failed.get_job_ids(cleanup=False)) == sorted(hostile)
    # Nothing ran out of bounds: every reason is one sentence of ours, not a traceback of somebody's code.
    assert [reason for reason in lines.rejected.values() if "Traceback" in reason] == []
    assert connection.llen(f"rq:queue:{keys.QUEUE}:intermediate") == 0
    assert not connection.exists("rq:wip:another-queue", "rq:finished:another-queue")
    assert connection.ttl("rq:job:for-ages") > 0 and connection.ttl("rq:job:not-at-all") > 0


@pytest.mark.parametrize("where", ["queued", "started", "scheduled", "deferred"])
def test_what_is_too_large_is_not_even_read(redis_url: str, tmp_path: Path, where: str) -> None:
    """Neither from the queue nor from a registry: a producer may write to the hash of any job at any time."""
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    registries = {
        "started": "rq:wip:feedback",
        "scheduled": "rq:scheduled:feedback",
        "deferred": "rq:deferred:feedback",
    }
    for job_id, fields in {
        "large": {"data": os.urandom(16 * 1024 * 1024)},
        "wide": {"data": zlib.compress(call())} | {f"field{i}": os.urandom(10_000) for i in range(1600)},
    }.items():
        push(connection, job_id, fields)
        if where != "queued":
            connection.delete(f"rq:queue:{keys.QUEUE}")
            connection.zadd(registries[where], {f"{job_id}:e" if where == "started" else job_id: 1})
    before = connection.info("stats")["total_net_output_bytes"]
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert connection.info("stats")["total_net_output_bytes"] - before < 4 * 1024 * 1024
    failed = FailedJobRegistry(keys.QUEUE, connection=connection)
    assert sorted(failed.get_job_ids(cleanup=False)) == ["large", "wide"] and weights.trained == []


def test_ids_that_are_no_jobs_are_dropped(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    producer = Producer(redis_url)
    connection.set("rq:job:a-string", "x")
    for job_id in (b"\xff\xfe", b"", b"a" * 5000, b"a:b", b"gone", b"a-string", b"../../x", b"rq:job:good-0"):
        push(connection, job_id)
        producer.enqueue(GOOD, id=f"good-{len(connection.keys('rq:job:good-*'))}")
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert weights.trained == [f"good-{i}" for i in range(8)]
    assert len(lines.notices) == 8 and max(map(len, lines.notices)) < 120
    assert connection.llen(f"rq:queue:{keys.QUEUE}:intermediate") == 0


def test_nothing_in_this_process_unpickles_even_without_a_serializer(redis_url: str, tmp_path: Path) -> None:
    connection, canary = redis.Redis.from_url(redis_url), str(tmp_path / CANARY)
    open_queue(connection)
    evil = pickle.dumps(Touch(canary))
    connection.hset("rq:job:x", mapping={"data": evil, "meta": evil, "status": "queued"})
    job = Job.fetch("x", connection=connection)  # RQ's own class, no serializer: as RQ itself does in places
    with pytest.raises(DeserializationError):
        _ = job.func_name
    assert not Path(canary).exists()


def test_what_a_person_requeues_is_read_as_carefully_again(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    canary = str(tmp_path / CANARY)
    hostile = attacks(canary)
    for job_id, fields in hostile.items():
        push(connection, job_id, fields)
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert weights.trained == []
    lines.rejected.clear()
    for job_id in hostile:
        open_queue(connection).failed_job_registry.requeue(job_id)
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    # Where the transcript was sound, only what was wrong around it is gone: callbacks, webhooks, unreadable fields.
    assert sorted([*weights.trained, *lines.rejected]) == sorted(hostile)
    sound = {
        "on-success",
        "on-stopped",
        "webhook",
        "no-number",
        "no-status",
        "no-date",
        "repeats",
        "slot",
        *("intervals-text", "intervals-huge", "intervals-map", "intervals-many"),
    }
    assert set(weights.trained) <= sound
    assert not Path(canary).exists()


def test_keys_of_a_wrong_type_beside_a_job_stop_nobody_else(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    producer = Producer(redis_url)
    ids = ["executions", "results", "dependents", "known", "good"]
    for job_id in ids:
        producer.enqueue(GOOD, id=job_id)
    for key in ("rq:executions:executions", "rq:results:results", "rq:job:dependents:dependents", "rq:results:known"):
        connection.set(key, "of a wrong type")
    connection.hset(keys.LEDGER, "known", 0)
    start(connection, weights, hooks=[lines], linger=0, heartbeat=0.1).work(burst=True)
    assert sorted(weights.trained) == sorted(set(ids) - {"executions", "known"})
    assert lines.rejected == {
        "executions": "Redis key rq:executions:executions is of a wrong type: delete it, then requeue the job"
    }
    assert any("job known could not be given its result" in notice for notice in lines.notices)
    assert not connection.exists(keys.WORKER_LOCK)
    connection.delete("rq:executions:executions")
    open_queue(connection).failed_job_registry.requeue("executions")
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert "executions" in weights.trained


def test_what_a_dead_worker_held_cannot_stop_every_start(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    dead = {
        "intervals": {"retries_left": "3", "retry_intervals": '["a"]'},
        "more-intervals": {"retries_left": "3", "retry_intervals": "[1e300]"},
        "no-date": {"retries_left": "3", "created_at": "yesterday"},
        "dependents": {"retries_left": "0"},
        "slot": {"retries_left": "0", "rate_limit_key": "k", "rate_limit_concurrency": "1"},
        "executions": {"retries_left": "3"},
    }
    for job_id, fields in dead.items():
        connection.hset(f"rq:job:{job_id}", mapping={"data": zlib.compress(call()), "status": "started", **fields})
    for key in ("rq:job:a-string", "rq:job:dependents:dependents", "rq:rl:k:allowed", "rq:executions:executions"):
        connection.set(key, "of a wrong type")
    odd = ["a-string:e", "no-execution", b"\xff\xfe", "gone:e", "a:b:c", ""]
    connection.zadd(f"rq:wip:{keys.QUEUE}", {entry: 1 for entry in [*odd, *(f"{job_id}:e" for job_id in dead)]})
    Producer(redis_url).enqueue(GOOD, id="good")
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert weights.trained == ["good"]
    assert set(lines.rejected) == {"intervals", "more-intervals", "executions"}
    failed = FailedJobRegistry(keys.QUEUE, connection=connection).get_job_ids(cleanup=False)
    assert sorted(failed) == sorted(dead)
    assert sum("no such job" in notice for notice in lines.notices) == len(odd)
    assert connection.zcard(f"rq:wip:{keys.QUEUE}") == 0


def test_a_recorded_version_is_settled_whatever_became_of_its_jobs(redis_url: str, tmp_path: Path) -> None:
    connection, weights = redis.Redis.from_url(redis_url), Weights(tmp_path)
    producer = Producer(redis_url)
    ids = [producer.enqueue(GOOD, id=job_id).id for job_id in ("good", "becomes-a-string", "gone", "depends")]
    worker = start(connection, weights, hooks=[])
    run = weights.run

    class Killed(BaseException):
        pass

    def dies(prepared: Any) -> None:
        run(prepared)
        connection.set("rq:job:becomes-a-string", "x")
        connection.delete("rq:job:gone")
        connection.hset("rq:job:depends", "dependency_ids", "5")
        connection.zadd(f"rq:wip:{keys.QUEUE}", {b"\xff": 1})
        raise Killed

    weights.run = dies  # type: ignore[method-assign, assignment]
    with pytest.raises(Killed):
        worker.work(burst=True)
    weights.run = run  # type: ignore[method-assign]
    start(connection, weights, hooks=[]).work(burst=True)
    assert weights.trained == ids and producer.version() == 1
    assert ledger.versions(connection, ids) == dict.fromkeys(ids, 1)


def test_retries_that_are_due_and_maintenance_meet_broken_keys(redis_url: str, tmp_path: Path) -> None:
    connection, weights, lines = redis.Redis.from_url(redis_url), Weights(tmp_path), Lines()
    connection.set("rq:job:a-string", "x")
    push(connection, "due", {"data": zlib.compress(call()), "ttl": b"9" * 18, "status": b"scheduled"})
    connection.delete(f"rq:queue:{keys.QUEUE}")
    connection.zadd(f"rq:scheduled:{keys.QUEUE}", {"a-string": 1, b"\xff": 1, "gone": 1, "due": 1})
    connection.set(f"rq:finished:{keys.QUEUE}", "of a wrong type")
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert weights.trained == ["due"]
    assert any("maintenance of RQ's registries broke off" in notice for notice in lines.notices)


garbage = st.binary(max_size=200) | st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
).map(lambda value: zlib.compress(msgpack.packb(value)))
almost = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(
            st.dictionaries(st.sampled_from(["role", "content", "x"]), st.text(max_size=5) | st.none())
        ),
        "weight": st.floats() | st.text(max_size=3),
        "train_on": st.text(max_size=4) | st.lists(st.integers(-(2**63), 2**64 - 1)),
        "tools": st.none() | st.lists(st.none()),
    },
).map(lambda transcript: zlib.compress(call(args=[transcript])))
FIELDS = ["status", "timeout", "created_at", "retries_left", "result_ttl", "meta", "dependency_ids", "origin", "ttl"]
FIELDS += ["retry_intervals", "repeat_intervals", "group_id", "rate_limit_key", "rate_limit_concurrency"]
odd = st.binary(max_size=20) | st.sampled_from(
    [
        b"5",
        b"-1",
        b"{}",
        b"[]",
        b"[1e300]",
        b'["a"]',
        b'{"a": 1}',
        b'["\\ud800"]',
        b"null",
        b"NaN",
        b"[null]",
        b"9" * 18,
    ]
)


@given(data=garbage | almost, extra=st.dictionaries(st.sampled_from(FIELDS), odd, max_size=4))
def test_whatever_a_hash_holds_reading_it_only_fails_as_it_may(data: bytes, extra: dict[str, bytes]) -> None:
    job = FeedbackJob("x", connection=redis.Redis(), serializer=MsgpackSerializer)
    job.restore({name.encode(): value for name, value in extra.items()} | {b"data": data})
    with contextlib.suppress(TandemError, DeserializationError):
        assert job.transcript().messages
    encoder = job.connection.get_encoder()
    fields = job.to_dict()  # and it can be saved again, to be marked as failed
    assert fields and all(isinstance(encoder.encode(value), bytes) for value in fields.values())
    assert not job.retries_left or job.get_retry_interval() >= 0


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(payloads=st.lists(st.tuples(garbage, st.dictionaries(st.sampled_from(FIELDS), odd)), max_size=12))
def test_garbage_never_stops_the_good(
    redis_url: str, tmp_path: Path, payloads: list[tuple[bytes, dict[str, bytes]]]
) -> None:
    connection = redis.Redis.from_url(redis_url)
    connection.flushall()
    weights, lines, producer = Weights(tmp_path), Lines(), Producer(redis_url)
    weights.set_header("a" * 32, 0, "CLEAN")
    (tmp_path / "weights").unlink(missing_ok=True)
    for i, (data, extra) in enumerate(payloads):
        push(connection, f"bad-{i}", {"data": data} | extra)
        producer.enqueue(GOOD, id=f"good-{i}")
    start(connection, weights, hooks=[lines], linger=0).work(burst=True)
    assert weights.trained == [f"good-{i}" for i in range(len(payloads))]
    assert connection.llen(f"rq:queue:{keys.QUEUE}:intermediate") == 0
