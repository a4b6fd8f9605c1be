"""RQ's own tools and versions beside our worker: `rq info`, suspend, requeue, worker names."""

import subprocess
import sys

import pytest
import redis
from drain_parts import Weights, counts, drain, say, start
from patience import until
from rq import Worker
from rq.job import Job
from rq.suspension import resume, suspend

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from worker.consumer.jobs import open_queue


def test_rq_sees_a_worker_and_running_jobs_during_a_step(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    seen: dict[str, object] = {}
    run = weights.run

    def watch(prepared):  # type: ignore[no-untyped-def]
        (worker,) = Worker.all(connection=connection)
        seen.update(state=worker.get_state(), executions=len(worker.get_current_executions()), **counts(connection))
        connection.expire(keys.WORKER_LOCK, 50)

        def leases() -> list[float]:
            return [score for _, score in connection.zrange(f"rq:wip:{keys.QUEUE}", 0, -1, withscores=True)]

        before = max(leases())
        until(lambda: min(leases()) > before, "every job's lease is renewed")
        until(lambda: connection.ttl(keys.WORKER_LOCK) > 50, "the lock is renewed")
        return run(prepared)

    weights.run = watch  # type: ignore[method-assign]
    for i in range(3):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    drain(connection, weights, heartbeat=0.2)
    assert seen["state"] == "busy" and seen["executions"] == 3 and seen["started"] == 3
    assert Worker.all(connection=connection) == []


def test_rqs_own_commands_work(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    for i in range(6):
        Producer(redis_url).enqueue(say("unpreparable" if i == 2 else "good"), id=f"t{i}")
    seen: list[str] = []
    run, rq = weights.run, [sys.executable, "-m", "rq.cli"]

    def look(prepared):  # type: ignore[no-untyped-def]
        command = [*rq, "info", "--raw", "-u", redis_url]
        seen.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return run(prepared)

    weights.run = look  # type: ignore[method-assign]
    drain(connection, weights, max_jobs=4, name="w")
    assert "queue feedback 2, 3 executing, 0 finished, 1 failed" in seen[0] and "busy feedback" in seen[0]
    assert "queue feedback 0, 2 executing, 3 finished, 1 failed" in seen[1]
    requeue = ["requeue", "--all", "--queue", keys.QUEUE, "-S", "producer.serializer.MsgpackSerializer"]
    subprocess.run([*rq, *requeue, "-u", redis_url], check=True, capture_output=True)
    assert open_queue(connection).job_ids == ["t2"] and counts(connection)["failed"] == 0


def test_rq_suspend_holds_the_worker_back(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    suspend(connection)
    drain(connection, weights)
    assert weights.trained == [] and counts(connection)["queued"] == 1
    resume(connection)
    drain(connection, weights)
    assert weights.trained == ["t0"]


def test_an_rq_without_what_we_need_is_refused_at_start(
    connection: redis.Redis, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq.VERSION", "3.1.0")
    with pytest.raises(TandemError, match=r"rq 3\.1\.0 is installed"):
        open_queue(connection)
    monkeypatch.undo()
    monkeypatch.delattr(Job, "prepare_for_execution")
    with pytest.raises(TandemError, match=r"lacks Job\.prepare_for_execution"):
        open_queue(connection)


def test_a_name_of_a_dead_worker_elsewhere_can_be_taken_again(connection: redis.Redis, weights: Weights) -> None:
    before = Worker([open_queue(connection)], connection=connection, name="the-worker")
    before.hostname = "a-container-that-is-gone"
    before.register_birth()
    worker = start(connection, weights, hooks=[], name="the-worker")
    worker.work(burst=True)
    assert worker.name == "the-worker"


def test_a_redis_that_is_late_does_not_end_the_thread_that_hears_commands(
    connection: redis.Redis, weights: Weights
) -> None:
    worker, calls = start(connection, weights, hooks=[]), []
    worker.subscribe()
    get_message = worker.pubsub.get_message

    def late(*args: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise redis.TimeoutError("Timeout reading from socket")
        return get_message(*args, **named)

    worker.pubsub.get_message = late
    thread = worker.pubsub_thread
    until(lambda: len(calls) > 1 or not thread.is_alive(), "the thread looks again")
    assert thread.is_alive()
    worker.unsubscribe()
    worker.lock.release()
