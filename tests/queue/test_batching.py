"""Which jobs make a version: how batches fill, and what is written of each."""

import pytest
import redis
from drain_parts import Lines, Weights, counts, drain, job, say, start
from patience import PATIENCE
from rq import Retry
from rq.job import JobStatus

from producer import keys
from producer.client import Producer
from worker.consumer import batcher
from worker.consumer.batch_worker import BatchWorker
from worker.consumer.jobs import open_queue
from worker.versions import ledger


def test_a_batch_is_one_version_and_every_job_has_its_own_result(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    ids = [producer.enqueue(say("good"), id=f"t{i}").id for i in range(10)]
    lines = drain(connection, weights, max_jobs=4)
    assert weights.batches == [ids[:4], ids[4:8], ids[8:]]
    assert [line["jobs"] for line in lines.versions] == [4, 4, 2]
    assert producer.version() == 3 == weights.header["version"]
    assert [producer.wait(i, timeout=PATIENCE) for i in ids] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert [job(connection, i).return_value()["version"] for i in ids[3:5]] == [1, 2]
    assert [len(job(connection, i).results()) for i in ids] == [1] * 10, "taken once, begun once, finished once"
    assert counts(connection) == {"failed": 0, "finished": 10, "started": 0, "queued": 0}
    assert ledger.versions(connection, ids) == {i: 1 + n // 4 for n, i in enumerate(ids)}
    manifest = ledger.manifest(connection, 1)
    assert manifest["jobs"] == '["t0","t1","t2","t3"]' and float(manifest["loss"]) == 1.5
    assert {"linger_s", "tokenize_s", "step_s"} <= manifest.keys()
    events = connection.xrange(keys.EVENTS)
    assert [entry[b"version"] for _, entry in events] == [b"1", b"2", b"3"]
    assert float(connection.hget(keys.STATE, "commit_s")) > 0
    # Nothing is left behind but jobs, results and the registries: no executions, no lock, nothing in between.
    left = {key.decode().split(":")[1] for key in connection.keys("rq:*")}
    assert left <= {"job", "results", "queues", "finished", "worker", "clean_registries"}, left
    assert not connection.exists(keys.WORKER_LOCK)
    assert all(0 < connection.ttl(f"rq:job:{i}") <= keys.RESULT_TTL for i in ids)


def test_tokens_end_a_batch_and_what_does_not_fit_comes_next_in_order(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    for i, tokens in enumerate([40, 40, 30, 500, 10, 90, 1]):
        producer.enqueue(say(f"tokens {tokens}"), id=f"t{i}")
    drain(connection, weights, max_jobs=8, max_tokens=100)
    assert weights.batches == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"], ["t6"]]


@pytest.mark.parametrize(
    ("tokens", "batches"),
    [
        ([40, 40, 40], [2, 1]),  # few wait: a batch ends before it is longer than 100
        ([40, 40, 40, 40, 40, 40, 40, 40], [2, 2, 2, 2]),  # six wait beside two: still few
        ([40] * 9, [9]),  # many wait: one long batch
        ([40] * 14, [14]),
        ([60, 70, 70, 70, 70], [5]),  # four wait beside one
        ([60, 70, 70, 70], [1, 1, 1, 1]),
        ([300, 40, 40, 40], [3, 1]),  # what is long by itself is not made short: the limit of all is 400
        ([300, 40, 40], [3]),
    ],
)
def test_a_batch_ends_short_while_few_wait(
    redis_url: str, connection: redis.Redis, weights: Weights, tokens: list[int], batches: list[int]
) -> None:
    producer = Producer(redis_url)
    for i, count in enumerate(tokens):
        producer.enqueue(say(f"tokens {count}"), id=f"t{i}")
    drain(connection, weights, max_jobs=32, max_tokens=600 if len(tokens) > 4 else 400, short_tokens=100)
    assert [len(batch) for batch in weights.batches] == batches
    assert [one for batch in weights.batches for one in batch] == [f"t{i}" for i in range(len(tokens))]


def seen(worker: BatchWorker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each look at the queue found. A look comes after 0.1 s; the end of the linger is far away."""
    looks: list[int] = []
    fetch, worker.batcher.linger = worker.batcher.fetch, 600.0
    monkeypatch.setattr(batcher, "LOOKS", 6000)

    def look(count: int, wait: float) -> int:
        looks.append(fetch(count, wait))
        return looks[-1]

    monkeypatch.setattr(worker.batcher, "fetch", look)
    return looks


def test_a_batch_goes_after_two_looks_that_found_nothing(
    redis_url: str, connection: redis.Redis, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, lines, prepare = Producer(redis_url), Lines(), weights.prepare

    def more(job_id, transcript):  # type: ignore[no-untyped-def]
        if job_id in ("a0", "a1"):
            producer.enqueue(say("good"), id="a1" if job_id == "a0" else "a2")
        return prepare(job_id, transcript)

    weights.prepare = more  # type: ignore[method-assign]
    producer.enqueue(say("good"), id="a0")
    worker = start(connection, weights, hooks=[lines], max_jobs=100)
    looks = seen(worker, monkeypatch)
    assert worker.work(max_versions=1) == 1
    assert weights.batches == [["a0", "a1", "a2"]] and looks == [1, 1, 1, 0, 0]
    assert lines.versions[0]["linger_s"] >= 0.4


def test_jobs_that_come_now_and_then_keep_a_batch_open(
    redis_url: str, connection: redis.Redis, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comes after a look that found nothing: never two of these in a row."""
    producer = Producer(redis_url)
    producer.enqueue(say("good"), id="a0")
    worker = start(connection, weights, hooks=[], max_jobs=100)
    looks = seen(worker, monkeypatch)
    look = worker.batcher.fetch

    def then(count: int, wait: float) -> int:
        came = look(count, wait)
        if looks[-2:] == [1, 0] and len(looks) < 7:
            producer.enqueue(say("good"), id=f"a{len(looks)}")
        return came

    monkeypatch.setattr(worker.batcher, "fetch", then)
    assert worker.work(max_versions=1) == 1
    assert looks == [1, 0, 1, 0, 1, 0, 1, 0, 0] and len(weights.batches[0]) == 4


def test_linger_ends_a_batch_to_which_jobs_keep_coming(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer, lines = Producer(redis_url), Lines()
    prepare = weights.prepare

    def more(job_id, transcript):  # type: ignore[no-untyped-def]
        producer.enqueue(say("good"), id=f"a{int(job_id[1:]) + 1}")
        return prepare(job_id, transcript)

    weights.prepare = more  # type: ignore[method-assign]
    producer.enqueue(say("good"), id="a0")
    worker = start(connection, weights, hooks=[lines], max_jobs=100, linger=0.5)
    assert worker.work(max_versions=1) == 1
    assert lines.versions[0]["linger_s"] >= 0.5 and 1 <= len(weights.batches[0]) < 100


def test_a_job_on_its_last_try_trains_alone(connection: redis.Redis, weights: Weights) -> None:
    queue = open_queue(connection)
    for i in range(5):
        queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id=f"t{i}", retry=Retry(max=1))
        if i == 2:
            connection.hset("rq:job:t2", "retries_left", 0)
    drain(connection, weights)
    assert weights.batches == [["t0", "t1"], ["t2"], ["t3", "t4"]]


def test_an_id_is_trained_once_however_often_it_is_queued(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer, queue = Producer(redis_url), open_queue(connection)
    producer.enqueue(say("good"), id="one")
    for _ in range(3):
        connection.rpush(queue.key, "one")  # an id that sits in the list several times
    producer.enqueue(say("good"), id="two")
    drain(connection, weights)
    assert weights.trained == ["one", "two"]
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="one")  # past the producer, months later
    drain(connection, weights)
    assert weights.trained == ["one", "two"] and producer.version() == 1
    assert job(connection, "one").return_value() == {"version": 1, "already_trained": True}
    assert job(connection, "one").get_status() == JobStatus.FINISHED
    assert connection.llen(queue.intermediate_queue_key) == 0


def test_dependents_of_a_trained_transcript_are_released(connection: redis.Redis, weights: Weights) -> None:
    queue = open_queue(connection)
    first = queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="first")
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="second", depends_on=first)
    drain(connection, weights)
    assert weights.batches == [["first"], ["second"]]


def test_update_over_weights_is_in_the_manifest_and_the_log(
    redis_url: str, connection: redis.Redis, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    caplog.set_level(20)
    start(connection, weights).work(burst=True)
    assert float(ledger.manifest(connection, 1)["update_ratio"]) == pytest.approx(1e-4)
    assert " · update/weight 1.0e-04 · " in caplog.text


def test_a_hook_that_raises_stops_nothing(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    class Broken(Lines):
        def on_version(self, line: dict[str, object]) -> None:
            raise RuntimeError("a dashboard is down")

    Producer(redis_url).enqueue(say("good"), id="t0")
    start(connection, weights, hooks=[Broken()]).work(burst=True)
    assert counts(connection)["finished"] == 1
