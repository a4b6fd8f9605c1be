"""Producers at the same time, and answers of Redis that are lost: an id is queued once."""

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest
import redis
from producer_parts import TALK, queued

from producer import (
    AsyncProducer,
    Outcome,
    Producer,
    QueueUnavailableError,
    keys,
)
from producer.exchange import Chunk


def test_racing_producers_queue_an_id_once(redis_url: str, store: redis.Redis) -> None:
    ids = [f"r{i}" for i in range(60)]
    start = threading.Barrier(6)
    won: list[str] = []

    def race(many: bool) -> None:
        with Producer(redis_url) as mine:
            start.wait()
            if many:
                outcomes = mine.enqueue_many({"id": i, "messages": TALK} for i in ids)
            else:
                outcomes = [mine.enqueue(TALK, id=i) for i in ids]
            won.extend(outcome.id for outcome in outcomes if outcome.new)

    threads = [threading.Thread(target=race, args=(bool(n % 2),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(won) == Counter(ids) == Counter(queued(store))


def test_an_id_made_up_here_is_new_though_the_answer_was_lost(
    producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, lost = Chunk.done, []

    def lose(chunk: Chunk) -> None:
        if not lost:
            lost.append(chunk)
            raise redis.WatchError(
                "a ConnectionError occurred while watching"
            )  # redis-py's, when EXEC's answer is lost
        done(chunk)

    monkeypatch.setattr(Chunk, "done", lose)
    sent = producer.enqueue(TALK)
    assert lost and sent.outcome is Outcome.QUEUED and queued(store) == [sent.id]


@pytest.mark.parametrize("many", [False, True])
def test_an_id_that_another_producer_queues_in_between_is_not_queued_again(
    redis_url: str, producer: Producer, store: redis.Redis, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes after this one has looked, and before it writes."""
    write, calls = Chunk.write, []

    def late(chunk: Chunk, pipe: Any) -> None:
        calls.append(chunk.ids)
        if len(calls) == 1:
            with Producer(redis_url) as other:
                assert other.enqueue(TALK, id="a").new
        write(chunk, pipe)

    monkeypatch.setattr(Chunk, "write", late)
    if many:
        outcomes = producer.enqueue_many([{"id": id, "messages": TALK} for id in "bacb"])
        assert [(outcome.id, outcome.new) for outcome in outcomes] == [
            *(("b", True), ("a", False), ("c", True), ("b", False))
        ]
        assert calls == [["b", "a", "c"], ["a"], ["b", "c"]] and queued(store) == ["a", "b", "c"]
    else:
        assert not producer.enqueue(TALK, id="a").new
        assert queued(store) == ["a"]


def test_an_id_that_is_trained_in_between_is_answered_with_its_version(
    producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Chunk.write

    def late(chunk: Chunk, pipe: Any) -> None:
        monkeypatch.setattr(Chunk, "write", write)
        store.hset("rq:job:a", "status", "finished")
        store.delete("rq:job:a")
        store.hset(keys.LEDGER, "a", 7)
        write(chunk, pipe)

    monkeypatch.setattr(Chunk, "write", late)
    assert (producer.enqueue(TALK, id="a").version, queued(store)) == (7, [])


def test_jobs_that_keep_changing_are_given_up_in_one_sentence(
    producer: Producer, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Chunk.write

    def spoil(chunk: Chunk, pipe: Any) -> None:
        store.hset("rq:job:a", "x", 1)
        store.delete("rq:job:a")
        write(chunk, pipe)

    monkeypatch.setattr(Chunk, "write", spoil)
    with pytest.raises(QueueUnavailableError, match="changed the same jobs"):
        producer.enqueue(TALK, id="a")
    assert queued(store) == []


def test_a_race_lost_by_the_async_client_is_run_again(
    redis_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Chunk.write

    def late(chunk: Chunk, pipe: Any) -> None:
        monkeypatch.setattr(Chunk, "write", write)
        with Producer(redis_url) as faster:
            faster.enqueue(TALK, id="a")
        chunk.write(pipe)

    async def slower() -> Outcome:
        async with AsyncProducer(redis_url) as producer:
            return (await producer.enqueue(TALK, id="a")).outcome

    monkeypatch.setattr(Chunk, "write", late)
    assert (asyncio.run(slower()), queued(store)) == (Outcome.KNOWN, ["a"])
