"""Waiting for a version: asleep in Redis, woken by the end of the job, told why there is none."""

import asyncio
from typing import Any

import pytest
import redis
from patience import PATIENCE
from producer_parts import TALK, fail, once_blocked, train
from rq.job import Job
from rq.results import Result

from producer import (
    AsyncProducer,
    InvalidTranscriptError,
    Producer,
    State,
    Status,
    TranscriptFailedError,
    UnknownTranscriptError,
    WaitTimeoutError,
)
from producer.serializer import MsgpackSerializer


def test_wait_sleeps_in_redis_until_the_version(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a")
    calls = store.info("commandstats").get("cmdstat_xread", {"calls": 0})["calls"]
    thread = once_blocked(store, lambda: train(store, "a", 4))
    assert producer.wait("a", timeout=PATIENCE) == 4
    thread.join()
    assert store.info("commandstats")["cmdstat_xread"]["calls"] - calls <= 2
    assert producer.status("a") == Status("a", State.FINISHED, 4)


def test_wait_sees_an_end_that_came_between_its_look_and_its_sleep(
    producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer.enqueue(TALK, id="a")

    def late(left: float | None, client: Any) -> int:
        train(store, "a", 4)
        return 60_000  # longer than the socket waits: a sleep that misses the end breaks off with an error

    monkeypatch.setattr("producer.exchange.block_ms", late)
    assert producer.wait("a", timeout=PATIENCE) == 4


def test_wait_sleeps_no_longer_than_it_may(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    producer.enqueue(TALK, id="a")
    xread, blocks = producer._redis.xread, []
    monkeypatch.setattr(producer._redis, "xread", lambda *a, **k: (blocks.append(k["block"]), xread(*a, **k))[1])
    with pytest.raises(WaitTimeoutError):
        producer.wait("a", timeout=0.2)
    assert blocks and max(blocks) <= 200


def test_wait_says_why_a_transcript_failed(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a")
    thread = once_blocked(store, lambda: fail(store, "a", "ExampleError: one turn is longer than 4,096 tokens"))
    with pytest.raises(
        TranscriptFailedError, match=r"transcript a failed: ExampleError: one turn is longer than 4,096 tokens"
    ):
        producer.wait("a", timeout=PATIENCE)
    thread.join()
    assert producer.status("a").state == "failed"


def test_wait_after_a_failed_job_was_requeued_and_trained(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a")
    fail(store, "a", "x")
    Job.fetch("a", connection=store, serializer=MsgpackSerializer).requeue()
    thread = once_blocked(store, lambda: train(store, "a", 9))
    assert producer.wait("a", timeout=PATIENCE) == 9
    thread.join()


def test_wait_ends_for_cancelled_unknown_and_late(producer: Producer, store: redis.Redis) -> None:
    with pytest.raises(UnknownTranscriptError, match="'nobody'"):
        producer.wait("nobody", timeout=PATIENCE)
    producer.enqueue(TALK, id="a")
    with pytest.raises(WaitTimeoutError, match=r"still queued after 0\.1 s"):
        producer.wait("a", timeout=0.1)
    Job.fetch("a", connection=store, serializer=MsgpackSerializer).cancel()
    with pytest.raises(TranscriptFailedError, match="canceled"):
        producer.wait("a", timeout=PATIENCE)
    with pytest.raises(InvalidTranscriptError):
        producer.wait("../etc", timeout=PATIENCE)


def test_wait_notices_a_deleted_job(producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.connection.BLOCK_SECONDS", 0.2)
    producer.enqueue(TALK, id="a")
    thread = once_blocked(store, Job.fetch("a", connection=store, serializer=MsgpackSerializer).delete)
    with pytest.raises(UnknownTranscriptError):
        producer.wait("a", timeout=PATIENCE)
    thread.join()


def test_many_async_waits_leave_the_loop_free(redis_url: str, store: redis.Redis) -> None:
    """More waits than asyncio's default threads; meanwhile the loop queues and answers."""

    async def talk() -> list[int]:
        async with AsyncProducer(redis_url) as producer:
            ids = [(await producer.enqueue(TALK)).id for _ in range(60)]
            waits = asyncio.gather(*(producer.wait(job_id, timeout=PATIENCE) for job_id in ids))
            while store.info("clients")["blocked_clients"] < 60:
                await asyncio.sleep(0.01)
            assert (await producer.enqueue(TALK)).new
            for number, job_id in enumerate(ids):
                train(store, job_id, number)
            return list(await waits)

    assert asyncio.run(talk()) == list(range(60))


def test_results_are_kept_where_rq_keeps_them() -> None:
    """`wait` reads this stream by name; RQ renaming it must not go unseen."""
    assert Result.get_key("a") == "rq:results:a"
