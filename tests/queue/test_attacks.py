"""What somebody who can only write to Redis gets: nothing. Each attack fails alone, the good jobs around it train."""

import os
import pickle
import resource
import zlib
from pathlib import Path

import pytest
import redis
from attack_parts import CANARY, GOOD, SURVIVES, Touch, attacks, call, push
from drain_parts import Lines, Weights, start
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.registry import FailedJobRegistry

from producer import keys
from producer.client import Producer
from worker.consumer.jobs import open_queue


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
