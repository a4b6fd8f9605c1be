"""The producer against a real Redis: queued once, waited for, refused clearly, and with the rights of its ACL only."""

import asyncio
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from patience import PATIENCE
from rq import Queue
from rq.job import Job, JobStatus
from rq.results import Result

import producer as package
from producer import (
    AsyncEnqueued,
    AsyncProducer,
    Enqueued,
    InvalidTranscriptError,
    Outcome,
    Producer,
    QueueUnavailableError,
    State,
    Status,
    TandemError,
    Transcript,
    TranscriptFailedError,
    UnknownTranscriptError,
    WaitTimeoutError,
    keys,
)
from producer.exchange import Chunk
from producer.jobs import ACL
from producer.serializer import MsgpackSerializer
from worker.testing.redis_server import RedisServer

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody you know."}]


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def producer(redis_url: str) -> Iterator[Producer]:
    with Producer(redis_url) as made:
        yield made


def queued(store: redis.Redis) -> list[str]:
    return Queue(keys.QUEUE, connection=store, serializer=MsgpackSerializer).job_ids


def train(store: redis.Redis, job_id: str, version: int) -> None:
    """What a worker's commit writes for one job: ledger, version and RQ's own end of a job, in one transaction."""
    job = Job.fetch(job_id, connection=store, serializer=MsgpackSerializer)
    with store.pipeline(transaction=True) as pipe:
        pipe.hset(keys.LEDGER, job_id, str(version))
        pipe.set(keys.VERSION, version)
        pipe.lrem("rq:queue:" + keys.QUEUE, 1, job_id)
        job._handle_success(result_ttl=keys.RESULT_TTL, pipeline=pipe, worker_name="test")
        pipe.execute()


def fail(store: redis.Redis, job_id: str, why: str) -> None:
    job = Job.fetch(job_id, connection=store, serializer=MsgpackSerializer)
    with store.pipeline(transaction=True) as pipe:
        job.set_status(JobStatus.FAILED, pipeline=pipe)
        job._handle_failure(f"Traceback ...\n{why}\n", pipeline=pipe, worker_name="test")
        pipe.execute()


def once_blocked(store: redis.Redis, act: Callable[[], None]) -> threading.Thread:
    """Runs `act` as soon as a client is blocked in a read."""

    def run() -> None:
        client = redis.Redis(connection_pool=store.connection_pool)
        while not client.info("clients")["blocked_clients"]:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


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


def test_older_names_are_still_there() -> None:
    for name in ("InvalidTranscript", "QueueUnavailable", "UnknownTranscript", "TranscriptFailed", "WaitTimeout"):
        assert getattr(package, name) is getattr(package, name + "Error")
    from producer.jobs import Enqueued as older
    from producer.transcript import InvalidTranscript

    assert older is Enqueued and InvalidTranscript is InvalidTranscriptError


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


def test_the_rights_in_the_readme_are_those() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    begin = readme.index("ACL SETUSER app on >PASSWORD")
    assert " ".join(readme[begin : readme.index("\n\n", begin)].split()[5:]) == ACL


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
