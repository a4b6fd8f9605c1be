"""How a worker ends, and who may be the next: signals, torn weights, a server that is gone, the worker's lock."""

import os
import signal

import pytest
import redis
from drain_parts import Weights, counts, drain, job, say, start
from patience import until
from rq.job import JobStatus

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from worker.config.protocol import TornWeightsError, UnavailableError
from worker.consumer import transitions
from worker.consumer.jobs import open_queue
from worker.versions import ledger


def test_sigterm_finishes_the_batch_in_hand_and_puts_the_rest_back(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    for i in range(6):
        producer.enqueue(say("stops" if i == 0 else "tokens 60"), id=f"t{i}")
    before = signal.getsignal(signal.SIGTERM)
    worker = start(connection, weights, hooks=[], max_jobs=4, max_tokens=100)
    assert worker.work() == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert weights.trained == ["t0", "t1"]
    assert [i.decode() for i in connection.lrange(worker.queue.key, 0, -1)] == ["t2", "t3", "t4", "t5"]
    assert counts(connection) == {"failed": 0, "finished": 2, "started": 0, "queued": 4}
    assert job(connection, "t2").get_status() == JobStatus.QUEUED
    assert job(connection, "t2").retries_left == keys.MAX_RETRIES
    assert not connection.exists(keys.WORKER_LOCK)


def test_torn_weights_stop_the_worker_and_nothing_is_settled(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(say("tears"), id="t0")
    producer.enqueue(say("good"), id="t1")
    with pytest.raises(TornWeightsError, match="broke off"):
        drain(connection, weights, max_jobs=2)
    assert producer.version() == 0 and counts(connection)["started"] == 2 and counts(connection)["finished"] == 0
    with pytest.raises(TandemError, match=r"torn.*--new-lineage"):
        drain(connection, weights)
    assert not connection.exists(keys.WORKER_LOCK)
    weights.set_header("b" * 32, 0, "CLEAN")  # the server was restarted
    (weights.folder / "record").unlink()
    weights.run = lambda prepared: Weights.run(  # type: ignore[method-assign]
        weights, [type(p)(p.id, p.tokens, "good") for p in prepared]
    )
    drain(connection, weights)
    assert sorted(weights.trained) == ["t0", "t1"] and producer.version() == 1


def test_a_server_that_is_gone_costs_no_job_a_retry(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    for i in range(5):
        Producer(redis_url).enqueue(say("server gone" if i == 3 else "good"), id=f"t{i}")
    with pytest.raises(UnavailableError, match="the server is gone"):
        drain(connection, weights, max_jobs=5)
    queue = open_queue(connection)
    assert queue.job_ids == [f"t{i}" for i in range(5)]
    assert counts(connection) == {"failed": 0, "finished": 0, "started": 0, "queued": 5}
    assert job(connection, "t0").retries_left == keys.MAX_RETRIES


def test_a_second_worker_is_refused_and_told_who_is_first(connection: redis.Redis, weights: Weights) -> None:
    first = start(connection, weights, hooks=[], name="the-first")
    with pytest.raises(TandemError, match=rf"'the-first' \(pid {os.getpid()} on "):
        start(connection, weights, hooks=[], name="the-second")
    first.work(burst=True)
    start(connection, weights, hooks=[], name="the-second").work(burst=True)


def test_the_lock_is_given_back_even_if_the_jobs_in_hand_cannot_be(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(3):
        Producer(redis_url).enqueue(say("tokens 60"), id=f"t{i}")

    def breaks(prepared):  # type: ignore[no-untyped-def]
        connection.set(f"rq:queue:{keys.QUEUE}", "no list any more")
        raise TornWeightsError("broke off")

    weights.run = breaks  # type: ignore[method-assign]
    with pytest.raises(TornWeightsError):
        drain(connection, weights, max_tokens=100)
    assert not connection.exists(keys.WORKER_LOCK)


def test_what_is_wrong_with_a_job_does_not_cost_the_lock(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    run = weights.run

    def breaks_keys(prepared):  # type: ignore[no-untyped-def]
        connection.set("rq:executions:t0", "no set of executions any more")
        connection.expire(keys.WORKER_LOCK, 30)
        until(lambda: connection.ttl(keys.WORKER_LOCK) > 40, "the lock is renewed")
        return run(prepared)

    weights.run = breaks_keys  # type: ignore[method-assign]
    drain(connection, weights, heartbeat=0.1)
    assert weights.trained == ["t0"] and counts(connection)["finished"] == 1


def test_an_error_in_the_heartbeat_is_raised_between_steps(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(2):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    worker = start(connection, weights, hooks=[], max_jobs=1, heartbeat=0.05)
    run = weights.run

    def robbed(prepared):  # type: ignore[no-untyped-def]
        connection.set(keys.WORKER_LOCK, '{"name": "robber", "pid": 1}')
        until(lambda: worker.heartbeats.error is not None, "the heartbeat has noticed")
        return run(prepared)

    weights.run = robbed  # type: ignore[method-assign]
    with pytest.raises(TandemError, match="'robber'"):
        worker.work(burst=True)
    assert weights.trained == ["t0"] and ledger.state(connection).version == 1  # what was trained is committed
    assert b"robber" in connection.get(keys.WORKER_LOCK)


def test_putting_back_may_be_repeated(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    """The first answer was lost, say: each job is queued once, in order, with no retry spent."""
    ids = [Producer(redis_url).enqueue(say("good"), id=f"t{i}").id for i in range(3)]
    worker = start(connection, weights, hooks=[])
    held, _ = transitions.take(worker.queue, 3, 0)
    transitions.begin(worker, worker.queue, held)
    for _ in range(2):
        transitions.put_back(worker, worker.queue, held)
    assert worker.queue.job_ids == ids and counts(connection)["started"] == 0
    assert {job(connection, i).retries_left for i in ids} == {keys.MAX_RETRIES}
