"""The producer against a real Redis: what is queued, once, and what its answers say."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from patience import PATIENCE
from producer_parts import TALK, fail, queued, train
from rq import Queue
from rq.job import JobStatus

import producer as package
from producer import (
    AsyncEnqueued,
    AsyncProducer,
    Enqueued,
    InvalidTranscriptError,
    Outcome,
    Producer,
    State,
    Status,
    TandemError,
    Transcript,
    TranscriptFailedError,
    WaitTimeoutError,
    keys,
)
from producer.exchange import Chunk
from producer.serializer import MsgpackSerializer


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """Nothing is in it, not even what a worker publishes."""
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


def test_a_job_is_what_the_worker_expects(producer: Producer, store: redis.Redis) -> None:
    outcome = producer.enqueue(TALK, id="a", train_on=[1], weight=0.5, meta={"rating": 5})
    assert (outcome.id, outcome.new, outcome.version) == ("a", True, None)
    (job,) = Queue(keys.QUEUE, connection=store, serializer=MsgpackSerializer).jobs
    assert (job.func_name, job.kwargs, job.meta) == ("worker.train", {}, {"rating": 5})
    assert Transcript.from_dict(job.args[0]) == Transcript(id="a", messages=TALK, train_on=[1], weight=0.5)
    assert (job.description, job.origin, job.get_status()) == ("transcript a", "feedback", JobStatus.QUEUED)
    assert (job.retries_left, job.timeout) == (keys.MAX_RETRIES, keys.JOB_TIMEOUT)
    assert (job.result_ttl, job.failure_ttl) == (keys.RESULT_TTL, keys.FAILURE_TTL)
    assert job.enqueued_at is not None and store.ttl(job.key) == -1
    assert outcome.job is not None and outcome.job.get_position() == 0


def test_ids_are_made_up_when_absent(producer: Producer, store: redis.Redis) -> None:
    ids = [producer.enqueue(TALK).id for _ in range(3)]
    assert len(set(ids)) == 3 and queued(store) == ids


def test_a_known_id_gives_the_existing_job(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a", meta={"first": True})
    again = producer.enqueue(TALK, id="a", meta={"first": False})
    assert (again.new, again.version) == (False, None)
    assert again.job is not None and again.job.meta == {"first": True}
    assert queued(store) == ["a"]


def test_a_trained_id_gives_its_version_even_when_its_job_has_expired(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a")
    train(store, "a", 7)
    assert producer.enqueue(TALK, id="a").version == 7
    store.delete("rq:job:a", "rq:results:a")
    outcome = producer.enqueue(TALK, id="a")
    assert (outcome.new, outcome.version, outcome.job) == (False, 7, None)
    assert (producer.wait("a", 0), producer.version(), queued(store)) == (7, 7, [])


def test_nothing_invalid_is_queued(producer: Producer, store: redis.Redis) -> None:
    with pytest.raises(InvalidTranscriptError, match="weight"):
        producer.enqueue(TALK, weight=2)
    with pytest.raises(InvalidTranscriptError, match="id"):
        producer.enqueue(TALK, id="a:b")
    assert store.dbsize() == 0


def test_enqueue_many_goes_on_after_bad_ones(producer: Producer, store: redis.Redis) -> None:
    store.hset(keys.LEDGER, "old", "3")
    given: list[Any] = [{"id": "a", "messages": TALK}, {"messages": []}, Transcript(id="b", messages=TALK)]
    given += [{"id": "a", "messages": TALK}, "text", {"id": "old", "messages": TALK}]
    got = producer.enqueue_many(iter(given))
    bad = [(n, outcome.field) for n, outcome in enumerate(got) if outcome.refused]
    assert bad == [(1, "messages"), (4, "transcript")]
    good = [(outcome.id, outcome.new, outcome.version) for outcome in got if not outcome.refused]
    assert good == [("a", True, None), ("b", True, None), ("a", False, None), ("old", False, 3)]
    assert queued(store) == ["a", "b"]


def test_enqueue_many_is_more_than_one_pipeline(producer: Producer, store: redis.Redis) -> None:
    ids = [f"m{i}" for i in range(250)]
    assert len(producer.enqueue_many({"id": i, "messages": TALK} for i in ids)) == 250
    assert queued(store) == ids


def test_a_refused_transcript_is_an_outcome_like_the_others(producer: Producer, store: redis.Redis) -> None:
    queued, refused, nameless = producer.enqueue_many([{"id": "a", "messages": TALK}, {"id": "b"}, {"id": 7}])
    assert (queued.outcome, queued.field, queued.problem) == (Outcome.QUEUED, None, None)
    assert (refused.id, refused.outcome, refused.new, refused.field) == ("b", Outcome.REFUSED, False, "messages")
    assert refused.problem and refused.problem.startswith("is missing") and refused.job is None
    assert (nameless.id, nameless.refused) == ("", True)
    with pytest.raises(TranscriptFailedError, match=r"the transcript was refused: messages: is missing"):
        refused.wait(timeout=PATIENCE)
    train(store, "a", 3)
    again = producer.enqueue(TALK, id="a")
    assert again == Enqueued("a", Outcome.TRAINED, 3) and again.wait(timeout=0) == 3
    assert queued.wait(timeout=0) == 3
    assert type(again) is type(refused) is Enqueued


def test_a_word_that_rq_does_not_have_is_a_state_too(producer: Producer, store: redis.Redis) -> None:
    for word, state in [
        ("rate_limited", State.OTHER),
        ("lost", State.OTHER),
        ("\xff", State.OTHER),
        ("queued", "queued"),
    ]:
        store.hset("rq:job:a", "status", word.encode("latin-1"))
        assert producer.status("a").state == state
        with pytest.raises(WaitTimeoutError):
            producer.wait("a", timeout=0)


def test_a_lost_transcript_is_said_to_be_lost_until_it_is_queued_again(producer: Producer, store: redis.Redis) -> None:
    store.hset(keys.LOST, "a", "2026-01-01T00:00:00Z")
    assert producer.status("a").state is State.LOST
    with pytest.raises(TranscriptFailedError, match=r"transcript a is lost: .* at 2026-01-01.*hand it in again"):
        producer.wait("a", timeout=PATIENCE)
    assert producer.enqueue(TALK, id="a").new
    assert producer.status("a").state is State.QUEUED
    train(store, "a", 1)
    store.delete("rq:job:a")
    assert producer.status("a") == Status("a", State.FINISHED, 1)


def test_missing_are_those_without_job_and_version(producer: Producer, store: redis.Redis) -> None:
    ids = [f"m{i}" for i in range(250)]
    producer.enqueue_many({"id": i, "messages": TALK} for i in ids)
    train(store, "m7", 1)
    store.delete("rq:job:m7", "rq:job:m0", "rq:job:m249")
    assert producer.missing(ids) == ["m0", "m249"]
    assert producer.missing([]) == []
    with pytest.raises(InvalidTranscriptError):
        producer.missing(["a b"])


def test_older_names_are_still_there() -> None:
    for name in ("InvalidTranscript", "QueueUnavailable", "UnknownTranscript", "TranscriptFailed", "WaitTimeout"):
        assert getattr(package, name) is getattr(package, name + "Error")
    from producer.jobs import Enqueued as older
    from producer.transcript import InvalidTranscript

    assert older is Enqueued and InvalidTranscript is InvalidTranscriptError


def test_a_transaction_is_bounded_by_bytes_and_by_jobs(
    producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, sizes = Chunk.write, []

    def count(chunk: Chunk, pipe: Any) -> None:
        sizes.append(len(chunk.ids))
        write(chunk, pipe)

    monkeypatch.setattr(Chunk, "write", count)
    producer.enqueue_many({"messages": TALK} for _ in range(205))
    monkeypatch.setattr("producer.exchange.CHUNK_BYTES", 2500)  # a job is taken for 1,024 bytes and its payload
    producer.enqueue_many({"messages": TALK} for _ in range(5))
    assert sizes == [100, 100, 5, 2, 2, 1]


def test_version_before_the_first_is_zero(producer: Producer) -> None:
    assert producer.version() == 0
    assert producer.status("nobody") == Status("nobody", State.UNKNOWN)


def test_no_transcript_in_what_rq_shows(producer: Producer, store: redis.Redis) -> None:
    producer.enqueue(TALK, id="a")
    fields = store.hgetall("rq:job:a")
    readable = b" ".join(value for name, value in fields.items() if name != b"data")
    assert b"Nobody" not in readable and b"Who" not in readable


def test_async_calls_do_what_the_others_do(redis_url: str, store: redis.Redis) -> None:
    async def talk() -> None:
        async with AsyncProducer(redis_url) as producer:
            assert (await producer.enqueue(TALK, id="a")).new
            again = await producer.enqueue(TALK, id="a")
            assert not again.new
            with pytest.raises(TandemError, match="status"):
                _ = again.job
            got = await producer.enqueue_many([{"id": "b", "messages": TALK}, {"messages": []}])
            assert [sent.outcome for sent in got] == [Outcome.QUEUED, Outcome.REFUSED]
            assert all(isinstance(sent, AsyncEnqueued) for sent in got)
            with pytest.raises(TranscriptFailedError, match=r"refused: messages: is empty"):
                await got[1].wait()
            with pytest.raises(WaitTimeoutError):
                await producer.wait("a", timeout=0.05)
            fail(store, "b", "no")
            with pytest.raises(TranscriptFailedError, match="no"):
                await producer.wait("b")
            train(store, "a", 2)
            assert await producer.status("a") == Status("a", State.FINISHED, 2)
            assert await again.wait(timeout=0) == 2 and await producer.missing(["a", "c"]) == ["c"]
            assert not (await producer.eviction()).known
            assert await producer.version() == 2

    asyncio.run(talk())
