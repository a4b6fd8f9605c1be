"""How a job ends: finished with its version, failed alone, acknowledged, or settled for a worker that died.

Invariants: every function that writes is one transaction, or queues on the pipeline it is given, and may be repeated
when its answer was lost; nothing is queued because of a job's end but that job itself, for a retry; a job's hash is
written whole or changed where it exists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from redis.client import Pipeline

from producer import keys
from worker.consumer import rq_private
from worker.consumer.jobs import FeedbackQueue, open_queue
from worker.consumer.pipelines import merge, update_only
from worker.consumer.redis_errors import execute
from worker.consumer.rq_private import RqWorker
from worker.consumer.transitions import JobInHand, fetch, job_keys, owned, restore_lost


def finish(
    queue: FeedbackQueue, batch: Sequence[JobInHand], results: Mapping[str, Mapping[str, Any]], pipe: Pipeline
) -> None:
    """Queue on `pipe` all that makes finished RQ jobs of `batch`, each with its result."""
    first = len(pipe.command_stack)
    for held in batch:
        job = held.job
        ttl = job.get_result_ttl(keys.RESULT_TTL)
        rq_private.finish(job, results[held.id], ttl, held.execution, pipe)
        if held.execution:
            rq_private.end_execution(job, held.execution, pipe)
        else:
            pipe.lrem(queue.intermediate_queue_key, 1, job.id)
    merge(pipe, first)
    update_only(pipe, job_keys(batch), first)


def acknowledge(queue: FeedbackQueue, held: JobInHand, result: Mapping[str, Any]) -> str | None:
    """Finish, on its own, a job that was taken and never begun. Returns the key of its that is of a wrong type."""
    with queue.connection.pipeline() as pipe:
        finish(queue, [held], {held.id: result}, pipe)
        return execute(pipe, owned([held]))[1].get(held.id)


def after_commit(worker: RqWorker, batch: Sequence[JobInHand], notes: dict[Any, Any]) -> None:
    """What follows the transaction that finished jobs: the worker's state, and `notes` in `weights:state`."""
    for held in batch:
        if held.execution:
            worker.executions.pop(held.execution.id, None)
    with worker.connection.pipeline(transaction=False) as pipe:
        worker.set_state("idle", pipeline=pipe)
        pipe.hset(keys.STATE, mapping=notes)
        pipe.execute()


def fail(worker: RqWorker, queue: FeedbackQueue, held: JobInHand, reason: str, *, permanent: bool) -> None:
    """Settle one begun job as failed: retried if it may be, else in the failed registry with `reason`."""
    held.job.permanent = permanent
    with worker.connection.pipeline() as pipe:
        restore_lost(worker.connection, [held], pipe)
        _end_badly(queue, held, reason, pipe, worker)
        rq_private.count_failed(worker, pipe)
        execute(pipe, owned([held]))
    if held.execution:
        worker.executions.pop(held.execution.id, None)


def abandon(queue: FeedbackQueue, held: JobInHand) -> None:
    """End an execution whose worker died: one retry is spent, and without one left the job fails."""
    with queue.connection.pipeline() as pipe:
        if held.canceled:
            assert held.execution is not None
            rq_private.end_execution(held.job, held.execution, pipe)
        else:
            _end_badly(queue, held, "its worker died, and no retry is left", pipe, None)
        execute(pipe, owned([held]))


def _end_badly(queue: FeedbackQueue, held: JobInHand, reason: str, pipe: Pipeline, worker: RqWorker | None) -> None:
    first = len(pipe.command_stack)
    if held.execution:
        rq_private.end_execution(held.job, held.execution, pipe)
    if held.job.should_retry:
        rq_private.try_again(queue, held.job, pipe)
    else:
        rq_private.fail(worker, held.job, reason, held.execution, pipe)
    update_only(pipe, job_keys([held]), first)


def settle_with_rq(connection: redis.Redis) -> Callable[[dict[str, Any]], Callable[[Pipeline], None]]:
    """How a batch is settled that a dead worker trained: results -> what finishes its jobs on a pipeline."""
    queue = open_queue(connection)
    return lambda results: settle_recorded(queue, results)


def settle_recorded(queue: FeedbackQueue, results: dict[str, Any]) -> Callable[[Pipeline], None]:
    """For a batch a dead worker trained: a function that finishes its jobs on a pipeline, wherever they are now. What
    expired or was deleted is remembered by the ledger alone."""
    executions: dict[str, list[str]] = {}
    for _, job_id, execution_id in rq_private.started(queue):
        executions.setdefault(job_id, []).append(execution_id)
    batch = [JobInHand(job) for job in fetch(queue, list(results)) if job is not None]

    def settle(pipe: Pipeline) -> None:
        finish(queue, batch, results, pipe)
        for held in batch:
            pipe.lrem(queue.key, 0, held.id)
            for execution_id in executions.get(held.id, []):
                execution = rq_private.execution_of(queue, held.id, execution_id)
                rq_private.end_execution(held.job, execution, pipe)

    return settle
