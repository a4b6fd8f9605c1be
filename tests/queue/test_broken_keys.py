"""Keys that RQ would not make, and hashes that hold anything: nothing stops the good jobs beside them."""

import contextlib
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from attack_parts import GOOD, call, push
from drain_parts import Lines, Weights, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rq.exceptions import DeserializationError
from rq.registry import FailedJobRegistry

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.consumer.jobs import FeedbackJob, open_queue
from worker.versions import ledger


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
