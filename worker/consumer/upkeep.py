"""Jobs in nobody's hands: those of dead workers, retries whose time has come, jobs that waited for others.

Invariants: only ids out of RQ's own registries of this queue are queued, and only on this queue: a producer writes
jobs' hashes and the end of the queue, and neither says what is ours. A job that waits is ready when the ledger, which
no producer writes, has all that it waits for.
"""

import time
from collections.abc import Collection
from typing import Any

from worker.consumer import rq_private
from worker.consumer.events import EntryDropped, MaintenanceFailed, Notice
from worker.consumer.jobs import FeedbackJob, FeedbackQueue
from worker.consumer.pipelines import update_only
from worker.consumer.redis_errors import execute, retryable
from worker.consumer.settlement import abandon
from worker.consumer.transitions import JobInHand, fetch, owned, put_back_taken
from worker.versions import ledger

LOOK_AT = 100
"""Jobs that are looked at in one go."""


def recover(queue: FeedbackQueue, name: str) -> tuple[int, list[Notice]]:
    """Put back everything a dead worker held; only for `name`, the holder of the worker lock.

    Job by job: one that cannot be read must not stop every start. Returns how many jobs, and what was wrong.
    """
    rq_private.bury_dead_workers(queue, name)
    begun, wrong = _abandon_started(queue, ours=())
    return begun + put_back_taken(queue), wrong


def _abandon_started(queue: FeedbackQueue, ours: Collection[str]) -> tuple[int, list[Notice]]:
    begun = [entry for entry in rq_private.started(queue) if entry[1] not in ours]
    wrong: list[Notice] = []
    ids = [job_id for _, job_id, _ in begun]
    canceled = _members(queue, queue.canceled_job_registry.key, ids)
    for (entry, job_id, execution_id), job in zip(begun, fetch(queue, ids), strict=True):
        if job is None:
            queue.connection.zrem(queue.started_job_registry.key, entry)
            wrong.append(EntryDropped(repr(entry[:40])))
        else:
            gone = job_id in canceled and job.get_status(refresh=False) == "canceled"
            execution = rq_private.execution_of(queue, job_id, execution_id)
            abandon(queue, JobInHand(job, execution=execution, canceled=gone))
    return len(begun), wrong


def _members(queue: FeedbackQueue, key: str, ids: list[str]) -> set[str]:
    scores: Any = queue.connection.zmscore(key, ids) if ids else []
    return {job_id for job_id, score in zip(ids, scores, strict=True) if score is not None}


def enqueue_due(queue: FeedbackQueue) -> int:
    """Queue retries that are due, as RQ's forked scheduler would, and deferred jobs that are ready; how many."""
    scheduled, deferred = queue.scheduled_job_registry.key, queue.deferred_job_registry.key
    with queue.connection.pipeline(transaction=False) as pipe:
        pipe.zrangebyscore(scheduled, 0, time.time(), start=0, num=LOOK_AT)
        pipe.zrandmember(deferred, LOOK_AT)
        due, waiting = pipe.execute()
    return _enqueue(queue, scheduled, due, _always) + _enqueue(queue, deferred, waiting, _ready)


def _enqueue(queue: FeedbackQueue, registry: str, entries: list[bytes], choose: Any) -> int:
    """Move those of `entries` that `choose` names from a registry to the queue; entries that are no jobs go."""
    if not entries:
        return 0
    jobs = dict(zip(entries, fetch(queue, [entry.decode(errors="replace") for entry in entries]), strict=True))
    chosen = choose(queue, [job for job in jobs.values() if job is not None])
    gone = [entry for entry, job in jobs.items() if job is None or job in chosen]
    if not gone:
        return 0
    with queue.connection.pipeline() as pipe:
        pipe.zrem(registry, *gone)
        for job in chosen:
            rq_private.enqueue(queue, job, pipe, at_front=False)
        held = [JobInHand(job) for job in chosen]
        update_only(pipe, {job.key for job in chosen}, 1)
        execute(pipe, owned(held))
    return len(gone)


def _always(queue: FeedbackQueue, jobs: list[FeedbackJob]) -> list[FeedbackJob]:
    return jobs


def _ready(queue: FeedbackQueue, jobs: list[FeedbackJob]) -> list[FeedbackJob]:
    wanted = sorted({job_id for job in jobs for job_id in job.waits_for})
    trained = ledger.versions(queue.connection, wanted)
    return [job for job in jobs if all(job_id in trained for job_id in job.waits_for)]


def clean(queue: FeedbackQueue, ours: Collection[str]) -> list[Notice]:
    """Every ten minutes: registries, workers that are gone, and started jobs that are in no worker's hands. ours: the
    ids in the hands of this worker, the only one there is. Returns what was wrong."""
    try:
        rq_private.clean_registries(queue)
        rq_private.forget_workers_without_hash(queue)
        return _abandon_started(queue, ours)[1]
    except Exception as error:
        if retryable(error):
            raise
        return [MaintenanceFailed(type(error).__name__)]
