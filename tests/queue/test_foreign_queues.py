"""Whoever can write jobs' hashes decides nothing but what is trained: no other queue, no other job, no status."""

import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Lines, Weights, drain, start
from rq import Queue, SimpleWorker
from rq.job import JobStatus
from rq.registry import DeferredJobRegistry, FailedJobRegistry
from rq.serializers import DefaultSerializer

from producer import keys
from producer.client import Producer
from producer.serializer import MsgpackSerializer
from worker.consumer import upkeep
from worker.consumer.jobs import FeedbackJob, open_queue
from worker.consumer.transitions import JobInHand, begin, take

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
FEEDBACK = f"rq:queue:{keys.QUEUE}"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def hostile(canary: Path, **fields: str) -> dict[str, Any]:
    """A job for a plain RQ worker of another queue: its payload is a pickle that makes a file."""
    return {"data": zlib.compress(pickle.dumps(Touch(canary))), "origin": "default", "created_at": "", **fields}


def others_queues(connection: redis.Redis) -> list[bytes]:
    return [key for key in connection.keys("rq:queue:*") if not key.startswith(FEEDBACK.encode())]


def test_a_forged_dependent_is_put_on_no_other_queue(
    redis_url: str, connection: redis.Redis, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a producer of an older ACL could do: name a job of queue `default` as what waits for its transcript."""
    loads = DefaultSerializer.loads  # our worker makes msgpack RQ's default in this process; a plain one has pickle
    canary = tmp_path / "canary"
    producer = Producer(redis_url)
    for job_id, text in (("trained", "good"), ("refused", "unpreparable"), ("retried", "breaks the step")):
        producer.enqueue([GOOD[0], {"role": "assistant", "content": text}], id=job_id)
        connection.hset(
            f"rq:job:for-{job_id}", mapping=hostile(canary, status="deferred", dependency_ids=f'["{job_id}"]')
        )
        connection.sadd(f"rq:job:{job_id}:dependents", f"for-{job_id}")
    drain(connection, weights)
    assert weights.trained == ["trained"] and others_queues(connection) == []
    monkeypatch.setattr(DefaultSerializer, "loads", loads)
    SimpleWorker([Queue("default", connection=connection)], connection=connection).work(burst=True)
    assert not canary.exists()


def test_a_job_of_a_dead_worker_queues_no_forged_dependent(
    redis_url: str, connection: redis.Redis, weights: Weights, tmp_path: Path
) -> None:
    Producer(redis_url).enqueue(GOOD, id="held")
    connection.hset("rq:job:held", "retries_left", 0)
    worker = start(connection, weights, hooks=[], name="dies")
    begin(worker, worker.queue, take(worker.queue, 1, 0)[0])  # and then it dies
    connection.hset("rq:job:evil", mapping=hostile(tmp_path / "canary", status="deferred"))
    connection.sadd("rq:job:held:dependents", "evil")
    worker.lock.release()
    drain(connection, weights)
    assert others_queues(connection) == [] and "held" in FailedJobRegistry(keys.QUEUE, connection=connection)


def test_maintenance_looks_at_no_other_queue(connection: redis.Redis, tmp_path: Path) -> None:
    """RQ's own maintenance promotes the waiting jobs of every rate limit, and queues what started jobs say."""
    queue = open_queue(connection)
    other = Queue("default", connection=connection)
    connection.hset("rq:job:evil", mapping=hostile(tmp_path / "canary", status="started", retries_left="3"))
    connection.zadd(f"rq:wip:{keys.QUEUE}", {"evil:e": 1})
    connection.zadd("rq:wip:default", {"evil:e": 1})
    connection.zadd("rq:ready:default", {"evil": 1})
    assert upkeep.clean(queue, ours=()) == []
    assert other.count == 0 and others_queues(connection) == []
    assert queue.job_ids == ["evil"], "what was started here is tried again here, where it cannot be read"
    assert connection.zcard("rq:wip:default") == 1


@pytest.mark.parametrize("origin", ["default", "feedback:intermediate", ""])
def test_what_is_requeued_stays_on_this_queue_whatever_its_hash_says(
    redis_url: str, connection: redis.Redis, weights: Weights, origin: str
) -> None:
    Producer(redis_url).enqueue([GOOD[0], {"role": "assistant", "content": "unpreparable"}], id="a")
    drain(connection, weights)
    connection.hset("rq:job:a", "origin", origin)
    FeedbackJob.fetch("a", connection=connection, serializer=MsgpackSerializer).requeue()
    assert connection.lrange(FEEDBACK, 0, -1) == [b"a"] and others_queues(connection) == []


@pytest.mark.parametrize("status", ["canceled", "finished", "failed", "stopped", "deferred", "scheduled", "nonsense"])
def test_a_forged_status_neither_drops_nor_settles_a_job(
    redis_url: str, connection: redis.Redis, weights: Weights, status: str
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(GOOD, id="queued")
    producer.enqueue(GOOD, id="begun")
    connection.lrem(FEEDBACK, 1, "begun")
    connection.rpush(f"{FEEDBACK}:intermediate", "begun")
    worker = start(connection, weights, hooks=[], name="dies")
    (job,) = [FeedbackJob.fetch("begun", connection=connection, serializer=MsgpackSerializer)]
    begin(worker, worker.queue, [JobInHand(job)])  # and then its worker dies
    worker.lock.release()
    for job_id in ("queued", "begun"):
        connection.hset(f"rq:job:{job_id}", "status", status)
    drain(connection, weights)
    wanted = {"queued", "begun"} if status != "nonsense" else set()  # which cannot be read, and fails
    assert set(weights.trained) == wanted and connection.zcard(f"rq:wip:{keys.QUEUE}") == 0
    assert FailedJobRegistry(keys.QUEUE, connection=connection).get_job_count() == 2 - len(wanted)


def test_what_a_person_cancels_is_not_trained(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    producer = Producer(redis_url)
    for job_id in ("a", "b"):
        producer.enqueue(GOOD, id=job_id)
    FeedbackJob.fetch("a", connection=connection, serializer=MsgpackSerializer).cancel()
    connection.rpush(FEEDBACK, "a")
    drain(connection, weights)
    assert weights.trained == ["b"] and producer.status("a").state == "canceled"
    assert connection.llen(f"{FEEDBACK}:intermediate") == 0


def test_a_started_status_written_in_between_does_not_stop_the_worker(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    """A refused job's hash says `started` again at once: the worker goes on all the same."""
    producer = Producer(redis_url)
    producer.enqueue([GOOD[0], {"role": "assistant", "content": "unpreparable"}], id="bad")
    producer.enqueue(GOOD, id="good")

    class Forger(Lines):
        def on_rejected(self, job_id: str, reason: str) -> None:
            super().on_rejected(job_id, reason)
            connection.hset(f"rq:job:{job_id}", "status", "started")

    lines = Forger()
    start(connection, weights, hooks=[lines], linger=0.0).work(burst=True)
    drain(connection, weights)
    assert weights.trained == ["good"] and list(lines.rejected) == ["bad"]
    assert connection.zcard(f"rq:wip:{keys.QUEUE}") == 0 and connection.llen(FEEDBACK) == 0


def test_deferred_jobs_of_ours_are_queued_once_the_ledger_has_what_they_wait_for(
    connection: redis.Redis, weights: Weights, tmp_path: Path
) -> None:
    queue = open_queue(connection)
    first = queue.enqueue(keys.FUNCTION, {"messages": GOOD}, job_id="first")
    second = queue.enqueue(keys.FUNCTION, {"messages": GOOD}, job_id="second", depends_on=first)
    queue.enqueue(keys.FUNCTION, {"messages": GOOD}, job_id="third", depends_on=[first, second])
    queue.enqueue(
        keys.FUNCTION, {"messages": [GOOD[0], {"role": "assistant", "content": "unpreparable"}]}, job_id="bad"
    )
    queue.enqueue(keys.FUNCTION, {"messages": GOOD}, job_id="never", depends_on="bad")
    connection.hset(
        "rq:job:forged", mapping=hostile(tmp_path / "canary", status="deferred", dependency_ids='["first"]')
    )
    connection.zadd(f"rq:deferred:{keys.QUEUE}", {"no-such-job": 1})
    drain(connection, weights)
    assert weights.batches == [["first"], ["second"], ["third"]]
    assert DeferredJobRegistry(keys.QUEUE, connection=connection).get_job_ids() == ["never"]
    assert FeedbackJob.fetch("third", connection=connection).get_status() == JobStatus.FINISHED
    assert not connection.exists("rq:results:forged") and others_queues(connection) == []


def test_no_key_is_named_by_a_job(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    """Every name of a key or a queue that RQ reads out of a hash leads nowhere."""
    names = {"origin": "X", "group_id": "X", "worker_name": "X", "rate_limit_key": "X", "rate_limit_concurrency": "1"}
    names |= {"dependency_id": "X", "dependency_ids": '["X"]', "success_callback_name": "X.X", "description": "X"}
    producer = Producer(redis_url)
    for job_id, text in (("a", "good"), ("b", "unpreparable"), ("c", "breaks the step"), ("d", "good")):
        producer.enqueue([GOOD[0], {"role": "assistant", "content": text}], id=job_id)
        given = names if job_id == "d" else {name: names[name] for name in ("origin", "group_id", "dependency_ids")}
        connection.hset(f"rq:job:{job_id}", mapping=given)
    drain(connection, weights)
    assert weights.trained == ["a"] and [key for key in connection.keys("*") if b"X" in key] == []
