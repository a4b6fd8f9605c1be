"""Maintenance beside a batch that is being trained: it takes nothing out of the worker's own hands."""

from typing import Any

import redis
from drain_parts import Weights, counts, say, start

from producer import keys
from producer.client import Producer
from worker.consumer import transitions, upkeep


def test_maintenance_leaves_the_batch_in_hand_alone(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    producer = Producer(redis_url)
    for job_id in ("a", "b"):
        producer.enqueue(say("good"), id=job_id)
    worker = start(connection, weights, hooks=[])
    run, seen = weights.run, []

    def maintains(prepared: Any) -> Any:
        seen.append(upkeep.clean(worker.queue, {held.id for held in worker.batcher.hands}))
        seen.append(counts(connection))
        return run(prepared)

    weights.run = maintains  # type: ignore[method-assign]
    worker.work(burst=True)
    assert seen == [[], {"failed": 0, "finished": 0, "started": 2, "queued": 0}]
    assert weights.batches == [["a", "b"]] and counts(connection)["finished"] == 2


def test_maintenance_puts_back_what_is_in_nobodys_hands(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    """A plain RQ worker that was started on this queue by mistake, say, and killed."""
    Producer(redis_url).enqueue(say("good"), id="a")
    connection.delete(f"rq:queue:{keys.QUEUE}")
    connection.hset("rq:job:a", "status", "started")
    connection.zadd(f"rq:wip:{keys.QUEUE}", {"a:execution": 1})
    worker = start(connection, weights, hooks=[])
    assert upkeep.clean(worker.queue, ours=()) == [] and worker.queue.job_ids == ["a"]
    worker.work(burst=True)
    assert weights.trained == ["a"]


def test_what_a_dead_worker_had_taken_comes_first(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    for job_id in ("taken-1", "taken-2", "queued"):
        Producer(redis_url).enqueue(say("good"), id=job_id)
    dead = start(connection, weights, hooks=[], name="dead")
    assert [held.id for held in transitions.take(dead.queue, 2, 0)[0]] == ["taken-1", "taken-2"]
    dead.lock.release()
    start(connection, weights, hooks=[], max_jobs=1, linger=0).work(burst=True)
    assert weights.batches == [["taken-1"], ["taken-2"], ["queued"]]
