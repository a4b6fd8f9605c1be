"""A Redis that is away, full, foreign or forbidding: one clear sentence, without password or transcript."""

import asyncio
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from producer_parts import TALK, queued

from producer import (
    AsyncProducer,
    Producer,
    QueueUnavailableError,
    TandemError,
    keys,
)
from producer.exchange import Chunk
from producer.jobs import ACL
from worker.testing.redis_server import RedisServer


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("fields", "logged"),
    [
        ({}, "INFO.*unknown until a worker has started"),
        (
            {"maxmemory_policy": "allkeys-lru", "maxmemory": 9},
            r"WARNING.*allkeys-lru\): queued.*noeviction",
        ),
        ({"maxmemory_policy": "volatile-ttl", "maxmemory": 9}, "WARNING.*failed transcripts.*can be lost"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 0}, None),
        ({"maxmemory_policy": "noeviction", "maxmemory": 9}, None),
    ],
)
def test_an_application_is_told_once_what_redis_may_lose(
    fields: dict[str, Any],
    logged: str | None,
    producer: Producer,
    store: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if fields:
        store.hset(keys.STATE, mapping=fields)
    with caplog.at_level("INFO", logger="tandem.producer"):
        for _ in range(3):
            producer.enqueue(TALK)
    said = [f"{record.levelname} {record.getMessage()}" for record in caplog.records]
    assert len(said) == (1 if logged else 0)
    assert all(re.match(logged or "", line) for line in said)


def test_what_was_queued_before_redis_was_full_is_told(
    redis_url: str, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both clients, in order, so that a caller can go on from there."""
    write, calls = Chunk.write, []

    def fill(chunk: Chunk, pipe: Any) -> None:
        calls.append(chunk)
        if len(calls) % 3 == 0:
            store.config_set("maxmemory", 1)
        write(chunk, pipe)

    async def many(given: list[dict[str, Any]]) -> Any:
        async with AsyncProducer(redis_url) as producer:
            return await producer.enqueue_many(given)

    monkeypatch.setattr(Chunk, "write", fill)
    limit = store.config_get("maxmemory")["maxmemory"]
    for name, queue in (("s", Producer(redis_url).enqueue_many), ("a", lambda given: asyncio.run(many(given)))):
        given = [{"id": f"{name}{i}", "messages": TALK} for i in range(250)]
        try:
            with pytest.raises(QueueUnavailableError, match="is full") as caught:
                queue(given)
        finally:
            store.config_set("maxmemory", limit)
        assert [sent.id for sent in caught.value.queued] == [f"{name}{i}" for i in range(200)]
    assert queued(store) == [f"s{i}" for i in range(200)] + [f"a{i}" for i in range(200)]


def test_the_rights_in_the_docs_are_those() -> None:
    page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    begin = page.index("ACL SETUSER app on >PASSWORD")
    assert " ".join(page[begin : page.index("\n\n", begin)].split()[5:]) == ACL


def no_secrets(error: BaseException) -> str:
    """The sentence of an error, after making sure that nothing along its causes holds a password."""
    cause: BaseException | None = error
    while cause is not None:
        assert "hunter" not in str(cause) + repr(cause)
        cause = cause.__cause__
    return str(error)


def test_a_redis_that_is_away_is_named_without_its_password() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    producer = Producer(f"redis://app:hunter2@127.0.0.1:{port}/0")
    assert "hunter" not in repr(producer)
    for call in (
        producer.version,
        lambda: producer.enqueue(TALK),
        lambda: producer.wait("a"),
        lambda: producer.job("a"),
    ):
        with pytest.raises(QueueUnavailableError) as caught:
            call()
        assert f"cannot reach Redis at redis://127.0.0.1:{port}/0" in no_secrets(caught.value)


def test_a_wrong_password_is_said_to_be_wrong(redis_server: RedisServer) -> None:
    path = urlsplit(redis_server.url).path
    with Producer(f"unix://:hunter2@{path}") as producer, pytest.raises(QueueUnavailableError) as caught:
        producer.version()
    assert "refused the user or password" in no_secrets(caught.value)


@pytest.mark.parametrize(
    "url", ["redis://a:hunter/2@h/0", "http://a:hunter2@h", "hunter2", "redis://h:99999/0", "redis://:hunter2@h/name"]
)
def test_a_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(TandemError, match="not a Redis URL") as caught:
        Producer(url)
    no_secrets(caught.value)


def test_a_full_redis_refuses_in_one_sentence_without_the_transcript(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server, Producer(server.url) as producer:
        admin = redis.Redis.from_url(server.url)
        producer.enqueue(TALK, id="a")
        admin.config_set("maxmemory", "1mb")
        given = [{"id": f"x{i}", "messages": [TALK[0], {**TALK[1], "content": "hunter"}]} for i in range(120)]
        with pytest.raises(QueueUnavailableError, match="is full and queues nothing; raise its maxmemory") as caught:
            while producer.enqueue_many(given):
                given = [{**line, "id": line["id"] + "x"} for line in given]
        assert "HSET" not in no_secrets(caught.value)
        queue = set(queued(admin))
        assert {job_id for job_id in queue if not admin.exists(f"rq:job:{job_id}")} == set()
        assert len(list(admin.scan_iter("rq:job:*"))) == len(queue), "an id is queued with its job, or not at all"


def test_redis_url_comes_from_the_environment(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    with Producer() as producer:
        assert producer.version() == 0
    monkeypatch.delenv("REDIS_URL")
    assert repr(Producer()) == "Producer('redis://127.0.0.1:6379/0')"
