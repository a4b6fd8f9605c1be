"""A transcript's story, from the real producer and worker."""

from pathlib import Path

import pytest
import redis
from drain_parts import Weights, start
from page_parts import SCRIPT
from rq.results import Result

from producer import Producer, QueueUnavailableError, State, keys
from worker.config.protocol import JobResult
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch
from worker.operations import job_story

SECRET = "what the user said in confidence"


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": SECRET}, {"role": "assistant", "content": text}]


@pytest.fixture
def connection(redis_url: str, tmp_path: Path) -> redis.Redis:
    """One trained, one refused, one queued."""
    connection = redis.Redis.from_url(redis_url)
    with Producer(redis_url) as producer:
        for text in ("good", "unpreparable"):
            producer.enqueue(say(text), id=text, meta={"source": SECRET})
        start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
        producer.enqueue(say("good"), id="next")
    return connection


def test_a_trained_one_has_its_version_its_loss_and_its_times(connection: redis.Redis) -> None:
    found = job_story.story(connection, "good")
    assert (found.state, found.version, found.without, found.job) == (State.FINISHED, 1, None, True)
    assert [what for what, _ in found.times] == ["queued", "started", "ended"]
    assert SECRET not in repr(found)


@pytest.mark.parametrize("kind", ["demonstration", "correction"])
def test_its_result_says_kind_loss_and_counts(connection: redis.Redis, kind: str) -> None:
    report = {"turns": 2, "tokens": 40, "sequences": 1, "expansion": 1.0, "dropped_turns": SECRET}
    stored = JobResult(1, 1.25, report | ({} if kind == "demonstration" else {"kind": kind})).as_map()
    (job,) = fetch(open_queue(connection), ["good"])
    assert job is not None
    Result.create(job, Result.Type.SUCCESSFUL, ttl=100, return_value=stored)
    found = job_story.story(connection, "good")
    assert (found.kind, found.loss, found.counts) == (kind, 1.25, {"turns": 2, "tokens": 40})


def test_a_refused_one_has_its_reason(connection: redis.Redis) -> None:
    found = job_story.story(connection, "unpreparable")
    assert found.state is State.FAILED and found.reason and SECRET not in repr(found)
    count, failed = job_story.failed(connection)
    assert count == 1 and [one.id for one in failed] == ["unpreparable"] and failed[0].reason == found.reason


def test_what_waits_and_what_nobody_knows(connection: redis.Redis) -> None:
    assert job_story.waiting(connection) == ["next"]
    assert job_story.story(connection, "next").state is State.QUEUED
    assert job_story.story(connection, "nobody") == job_story.Story("nobody", State.UNKNOWN)


def test_a_dropped_one_says_which_version_was_made_without_it(connection: redis.Redis) -> None:
    connection.hset(keys.DROPPED, "good", 7)
    assert job_story.story(connection, "good").without == 7


def test_only_what_failed_is_queued_again(connection: redis.Redis) -> None:
    assert job_story.requeue(connection, "unpreparable") and not job_story.requeue(connection, "unpreparable")
    assert not job_story.requeue(connection, "good") and not job_story.requeue(connection, "a b")
    assert job_story.waiting(connection) == ["next", "unpreparable"]
    assert job_story.story(connection, "unpreparable").state is State.QUEUED


def test_a_job_that_nobody_of_us_wrote_has_a_story(connection: redis.Redis) -> None:
    odd = {"status": "finished", "data": b"\xff", "meta": b"\xff", "created_at": SCRIPT}
    connection.hset("rq:job:odd", mapping=odd)
    connection.xadd("rq:results:odd", {"type": "1", "return_value": b"\xff", "created_at": SCRIPT})
    connection.hset(keys.DROPPED, "odd", SCRIPT)
    found = job_story.story(connection, "odd")
    assert found.state is State.FINISHED and found.without is None and found.loss is None and not found.times
    connection.hset(keys.LEDGER, "odd", SCRIPT)
    with pytest.raises(QueueUnavailableError, match="weights:ledger"):
        job_story.story(connection, "odd")
