"""Jobs that Redis loses while the worker has them (evicted, restored from an old copy, deleted): whole or not at all.

A hash with a status and no transcript would be no job for anybody, and its id would count as known for a year."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from drain_parts import Weights, drain, say

from producer import keys
from producer.client import Producer
from producer.serializer import MsgpackSerializer
from worker.config.protocol import UnavailableError
from worker.consumer import transitions
from worker.consumer.jobs import FeedbackJob, open_queue

IDS = ["a", "b", "c"]


def lose(connection: redis.Redis) -> None:
    """Every job's hash, as an eviction does it: what else there is of the jobs stays."""
    connection.delete(*connection.keys("rq:job:*"))


def torn_jobs(connection: redis.Redis) -> list[bytes]:
    return [key for key in connection.keys("rq:job:*") if not connection.hexists(key, "data")]


def during_the_step(weights: Weights, do: Callable[[], None], then: type[Exception] | None = None) -> None:
    """The next step, and only that one, does `do` first; and then breaks, if asked to."""
    run = weights.run

    def step(prepared: Any) -> Any:
        weights.run = run  # type: ignore[method-assign]
        do()
        if then is not None:
            raise then("on purpose")
        return run(prepared)

    weights.run = step  # type: ignore[method-assign]


def test_what_is_put_back_is_the_whole_job(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    producer = Producer(redis_url)
    for job_id in IDS:
        producer.enqueue(say("good"), id=job_id, meta={"rating": 5})
    before = {job_id: connection.hgetall(f"rq:job:{job_id}") for job_id in IDS}
    during_the_step(weights, lambda: lose(connection), then=UnavailableError)
    with pytest.raises(UnavailableError):
        drain(connection, weights)
    assert open_queue(connection).job_ids == IDS and torn_jobs(connection) == []
    for job_id in IDS:
        job = FeedbackJob.fetch(job_id, connection=connection, serializer=MsgpackSerializer)
        assert job.transcript().messages == say("good") and job.meta == {"rating": 5}
        assert (job.get_status(), job.retries_left) == ("queued", keys.MAX_RETRIES)
        assert before[job_id].keys() - connection.hgetall(f"rq:job:{job_id}").keys() == set()
    assert not producer.enqueue(say("good"), id="a").new
    drain(connection, weights)
    assert weights.trained == IDS


def test_what_fails_or_is_tried_again_is_the_whole_job(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(say("not finite"), id="fails")
    producer.enqueue(say("good"), id="good")
    during_the_step(weights, lambda: lose(connection))
    lines = drain(connection, weights)
    assert list(lines.rejected) == ["fails"] and torn_jobs(connection) == []
    assert producer.status("fails").state == "failed" and producer.status("good").version == 1
    open_queue(connection).failed_job_registry.requeue("fails")
    assert open_queue(connection).job_ids == ["fails"]
    producer.enqueue(say("good"), id="tried-again")
    connection.lrem(f"rq:queue:{keys.QUEUE}", 1, "fails")
    during_the_step(weights, lambda: lose(connection), then=RuntimeError)
    drain(connection, weights)
    assert weights.trained == ["good", "tried-again"] and torn_jobs(connection) == []


def test_a_heartbeat_makes_no_job(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    producer = Producer(redis_url)
    for job_id in IDS:
        producer.enqueue(say("good"), id=job_id)
    seen: list[Any] = []

    def two_heartbeats() -> None:
        connection.delete(*connection.keys("rq:job:*"), *connection.keys("rq:execution:*"))
        for _ in range(2):
            connection.expire(keys.WORKER_LOCK, 30)
            while connection.ttl(keys.WORKER_LOCK) <= 30:
                time.sleep(0.01)
        seen.append(connection.keys("rq:job:*") + connection.keys("rq:execution:*"))

    during_the_step(weights, two_heartbeats)
    drain(connection, weights, heartbeat=0.05)
    assert seen == [[]]
    assert weights.trained == IDS and connection.keys("rq:job:*") == []
    assert [producer.enqueue(say("good"), id=job_id).version for job_id in IDS] == [1, 1, 1]


def test_a_job_lost_between_being_taken_and_begun_is_trained(
    redis_url: str, connection: redis.Redis, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(redis_url)
    for job_id in IDS:
        producer.enqueue(say("good"), id=job_id)
    begin = transitions.begin

    def late(*given: Any) -> Any:
        connection.delete("rq:job:b")
        return begin(*given)

    monkeypatch.setattr(transitions, "begin", late)
    drain(connection, weights)
    assert weights.trained == IDS and torn_jobs(connection) == []
    assert producer.enqueue(say("good"), id="b").version == 1


def test_a_redis_that_lost_everything_gets_the_jobs_back_whole(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    for job_id in IDS:
        producer.enqueue(say("good"), id=job_id)
    during_the_step(weights, connection.flushall, then=UnavailableError)
    with pytest.raises(UnavailableError):
        drain(connection, weights)
    assert torn_jobs(connection) == [] and open_queue(connection).job_ids == IDS
    drain(connection, weights)
    assert weights.trained == IDS and [producer.status(job_id).version for job_id in IDS] == [1, 1, 1]


def test_a_lost_job_that_is_sent_again_while_it_is_in_hand_is_trained_once(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(say("good"), id="a")

    def sent_again() -> None:
        lose(connection)
        assert producer.enqueue(say("good"), id="a").new

    during_the_step(weights, sent_again)
    drain(connection, weights)
    assert weights.trained == ["a"] and producer.status("a").version == 1
    assert open_queue(connection).job_ids == []
