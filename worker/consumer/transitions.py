"""The moves of a job's life, cut so that many jobs can share one round trip: take, begin, finish, fail, put back.

With worker/consumer/jobs.py the only place that touches RQ beyond its documented interface; checked on rq 3.0.0.
Must not know: weights, steps, how a batch is chosen.
Invariants: every function that writes is one transaction, or queues on the pipeline it is given, and may be repeated
when its answer was lost; ids in RQ's intermediate queue are exactly those taken and not yet begun.
"""

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.client import Pipeline
from rq import worker_registration
from rq.executions import Execution, ExecutionRegistry
from rq.job import JobStatus
from rq.rate_limit import release_slot
from rq.registry import ScheduledJobRegistry, StartedJobRegistry, clean_registries
from rq.results import Result
from rq.utils import now
from rq.worker import BaseWorker, SimpleWorker

from producer import keys
from producer.serializer import MsgpackSerializer
from producer.transcript import ID_PATTERN, MAX_ID
from worker.consumer.jobs import MAX_HASH, FeedbackJob, FeedbackQueue
from worker.consumer.pipelines import execute, merge, retryable

LEASE = 180
"""Seconds a begun job stays ours without a heartbeat."""


@dataclass(eq=False)
class Held:
    """A job in this worker's hands. version: what the ledger knows of it; execution: set once begun."""

    job: FeedbackJob
    version: int | None = None
    execution: Execution | None = None
    prepared: Any = None
    prepare_s: float = 0.0

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def alone(self) -> bool:
        """On its last try a job trains alone: if it is what kills workers, it takes no other with it."""
        return self.job.retries_left == 0


@dataclass(frozen=True)
class Dropped:
    """An id that was on the queue without a job that can be read."""

    raw_id: bytes
    why: str

    @property
    def lost(self) -> str | None:
        """The id of a job that is gone: evicted, or deleted."""
        return self.raw_id.decode() if self.why == NO_JOB else None

    def __str__(self) -> str:
        return f"dropped {self.raw_id[:40]!r} from the queue: {self.why}"


NO_JOB = "no such job"

# Moves up to ARGV[1] ids from the queue to the intermediate queue and reads their jobs, in one round trip. Ids that
# are no job ids, or have no job, are dropped. Reply per id: {id, ledger version or nil, fields | size | why dropped}.
_TAKE = """
local out = {}
local function drop(id, why)
  redis.call('LREM', KEYS[2], 1, id)
  out[#out + 1] = {string.sub(id, 1, ARGV[3]), false, why}
end
local function look(id)
  if #id > tonumber(ARGV[3]) or not string.find(id, '^[A-Za-z0-9_-]+$') then return drop(id, 'no valid job id') end
  local key = ARGV[4] .. id
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'hash' then return drop(id, 'no such job') end
  local size, count = 0, redis.call('HLEN', key)
  if count > 200 then size = tonumber(ARGV[2]) + 1 else
    for _, field in ipairs(redis.call('HKEYS', key)) do size = size + #field + redis.call('HSTRLEN', key, field) end
  end
  local body = size
  if size <= tonumber(ARGV[2]) then body = redis.call('HGETALL', key) end
  out[#out + 1] = {id, redis.call('HGET', KEYS[3], id), body}
end
if ARGV[5] ~= '' then look(ARGV[5]) end
for _ = 1, tonumber(ARGV[1]) do
  local id = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
  if not id then break end
  look(id)
end
return out
"""


def take(queue: FeedbackQueue, count: int, wait: float) -> tuple[list[Held], list[Dropped]]:
    """Up to `count` jobs off the queue, waiting up to `wait` seconds (0: not at all) for the first.

    Returns the jobs, oldest first, and the ids that were dropped because no job belongs to them.
    """
    rows = _take(queue, count, b"")
    if not rows and wait > 0:
        first: Any = queue.connection.blmove(queue.key, queue.intermediate_queue_key, max(wait, 0.01))  # type: ignore
        rows = _take(queue, count - 1, first) if first else []
    held, dropped = [], []
    for raw_id, version, body in rows:
        if isinstance(body, bytes):
            dropped.append(Dropped(raw_id, body.decode()))
            continue
        job = FeedbackJob(raw_id.decode(), connection=queue.connection, serializer=MsgpackSerializer)
        if isinstance(body, int):
            job.restore({b"data": b""})
            job.defect = f"the job is larger in Redis than {MAX_HASH} bytes"
        else:
            job.restore(dict(zip(body[::2], body[1::2], strict=True)))
        job.origin = queue.name  # registries are named after it: not the job's to choose
        held.append(Held(job, int(version) if version and version.isdigit() else None))
    return held, dropped


def _take(queue: FeedbackQueue, count: int, first: bytes) -> list[tuple[bytes, bytes | None, Any]]:
    script = queue.connection.register_script(_TAKE)
    names = [queue.key, queue.intermediate_queue_key, keys.LEDGER]
    result: Any = script(keys=names, args=[count, MAX_HASH, MAX_ID, FeedbackJob.redis_job_namespace_prefix, first])
    return result


def announce(queue: FeedbackQueue) -> None:
    """Name the queue among RQ's, for its tools (`rq info`, the dashboard). A producer has no right to do it."""
    queue.connection.sadd(queue.redis_queues_keys, queue.key)


def _owned(batch: Iterable[Held]) -> dict[str, str]:
    """The Redis keys that only one job uses -> that job's id."""
    found: dict[str, str] = {}
    for held in batch:
        executions: str = ExecutionRegistry(held.id, connection=held.job.connection).key
        found |= dict.fromkeys((held.job.key, executions, Result.get_key(held.id)), held.id)
        if held.execution:
            found[held.execution.key] = held.id
    return found


def begin(worker: BaseWorker, queue: FeedbackQueue, batch: Sequence[Held]) -> dict[str, str]:
    """Mark jobs as started by `worker`, out of the intermediate queue, in one transaction.

    Returns, per job with a key of a wrong type, that key: it has begun like the others, but must be failed.
    """
    with worker.connection.pipeline() as pipe:
        for held in batch:
            held.execution = Execution.create(held.job, LEASE, pipe, worker_name=worker.name)
            held.job.prepare_for_execution(worker.name, pipeline=pipe)
            pipe.persist(held.job.key)
            pipe.lrem(queue.intermediate_queue_key, 1, held.id)
        worker.set_state("busy", pipeline=pipe)
        merge(pipe)
        _, broken = execute(pipe, _owned(batch))
    for held in batch:
        assert held.execution is not None
        worker.executions[held.execution.id] = held.execution
    return broken


def finish(queue: FeedbackQueue, job: FeedbackJob, execution: Execution | None, result: Any, pipe: Pipeline) -> None:
    """Queue on `pipe` all that makes `job` a finished RQ job with `result`."""
    job.ended_at = now()
    job._result = result
    ttl = job.get_result_ttl(keys.RESULT_TTL)
    job._handle_success(
        ttl,
        pipeline=pipe,
        worker_name=job.worker_name or "",
        execution_id=execution.id if execution else None,
        execution_started_at=execution.created_at if execution else None,
        execution_ended_at=job.ended_at,
    )
    if ttl > 0:
        pipe.expire(job.key, ttl)
    if execution:
        execution.delete(job=job, pipeline=pipe)
    else:
        pipe.lrem(queue.intermediate_queue_key, 1, job.id)


def acknowledge(queue: FeedbackQueue, held: Held, result: Any) -> str | None:
    """Finish, on its own, a job that was taken and never begun. Returns the key of its that is of a wrong type."""
    with queue.connection.pipeline() as pipe:
        finish(queue, held.job, None, result, pipe)
        return execute(pipe, _owned([held]))[1].get(held.id)


def count_finished(worker: BaseWorker, count: int, seconds: float, pipe: Pipeline) -> None:
    """The worker's own statistics, as `rq info` and the dashboard show them."""
    pipe.hincrby(worker.key, "successful_job_count", count)
    pipe.hincrbyfloat(worker.key, "total_working_time", seconds)


def after_commit(worker: BaseWorker, queue: FeedbackQueue, batch: list[Held], notes: dict[Any, Any]) -> list[str]:
    """What follows the transaction that finished jobs: state, then dependents and rate-limit slots, as in RQ.

    Returns a sentence per job that could not release what waits for it.
    """
    for held in batch:
        if held.execution:
            worker.executions.pop(held.execution.id, None)
    with worker.connection.pipeline(transaction=False) as pipe:
        worker.set_state("idle", pipeline=pipe)
        pipe.hset(keys.STATE, mapping=notes)
        for held in batch:
            pipe.exists(held.job.dependents_key)
        dependents = pipe.execute()[2:]
    said: list[str] = []
    for held, has_dependents in zip(batch, dependents, strict=True):
        said += _release_others(queue, held.job, dependents=bool(has_dependents))
    return said


def _release_others(queue: FeedbackQueue, job: FeedbackJob, dependents: bool) -> list[str]:
    """Queue what waits for `job`; what is wrong with other jobs, or with the keys between them, is said, not raised."""
    said = []
    for wanted, release, what in (
        (dependents, queue.enqueue_dependents, "the jobs that depend on it stay deferred"),
        (job.has_rate_limit, release_slot, "its rate-limit slot was not released"),
    ):
        try:
            if wanted:
                release(job)  # type: ignore[operator]
        except Exception as error:
            if retryable(error):
                raise
            said.append(f"job {job.id}: {what} ({type(error).__name__}: what Redis has of them is broken)")
    return said


def forget(queue: FeedbackQueue, held: Held) -> None:
    """Drop a second copy of an id, or a canceled job, that was taken and never begun."""
    queue.connection.lrem(queue.intermediate_queue_key, 1, held.id)


def fail(worker: BaseWorker, queue: FeedbackQueue, held: Held, reason: str, *, permanent: bool) -> None:
    """Settle one begun job as failed through RQ: retried if it may be, else in the failed registry with `reason`."""
    job = held.job
    job.ended_at = now()
    job.permanent = permanent
    job._status = JobStatus.FAILED
    worker.handle_job_failure(job, queue, exc_string=reason, execution=held.execution)
    if job.get_status(refresh=True) == JobStatus.STARTED:  # RQ only logs when it could not write
        raise redis.ConnectionError(f"the failure of job {job.id} could not be written to Redis")


def put_back(worker: BaseWorker, queue: FeedbackQueue, batch: list[Held]) -> None:
    """Undo `begin`: the jobs are queued again, at the front, in order, with no retry spent. May be repeated."""
    with worker.connection.pipeline() as pipe:
        for held in reversed(batch):
            pipe.lrem(queue.intermediate_queue_key, 0, held.id)
            pipe.lrem(queue.key, 0, held.id)
            held.job.set_status(JobStatus.QUEUED, pipeline=pipe)
            queue.push_job_id(held.id, pipeline=pipe, at_front=True)
            if held.execution:
                held.execution.delete(job=held.job, pipeline=pipe)
        execute(pipe, _owned(batch))
    for held in batch:
        if held.execution:
            worker.executions.pop(held.execution.id, None)


def put_back_taken(queue: FeedbackQueue) -> int:
    """Put ids that were taken and never begun back at the front of the queue, in order; returns how many."""
    count = queue.connection.llen(queue.intermediate_queue_key)
    with queue.connection.pipeline() as pipe:
        for _ in range(count):
            pipe.lmove(queue.intermediate_queue_key, queue.key, "RIGHT", "LEFT")
        pipe.execute()
    return int(count)


def recover(queue: FeedbackQueue, name: str) -> tuple[int, list[str]]:
    """Put back everything a dead worker held; only for `name`, the holder of the worker lock.

    For jobs that had begun as RQ's StartedJobRegistry.cleanup() does it: one retry is spent, and without one left the
    job fails. But job by job: one that cannot be read, or whose dependents cannot, must not stop every start.
    Returns how many jobs, and a sentence per thing that was wrong.
    """
    for worker in SimpleWorker.all(queue=queue):
        gone = worker.hostname == socket.gethostname() and not Path(f"/proc/{worker.pid}").exists()
        if gone or worker.name == name:
            worker.register_death()  # or `rq info` shows the dead one for minutes, and we could not have its name
    registry = _started(queue)
    begun, said = _begun(registry), []
    jobs = _fetch(queue, [job_id for _, job_id, _ in begun])
    for (entry, job_id, execution_id), job in zip(begun, jobs, strict=True):
        if job is None:
            queue.connection.zrem(registry.key, entry)
            said.append(f"dropped {entry[:40]!r} from the started jobs: no such job")
        else:
            said += _abandon(queue, job, Execution(execution_id, job_id, queue.connection))
    return len(begun) + put_back_taken(queue), said


def _abandon(queue: FeedbackQueue, job: FeedbackJob, execution: Execution) -> list[str]:
    """End an execution whose worker died."""
    held, started = Held(job, execution=execution), job.get_status(refresh=False) == JobStatus.STARTED
    job.origin = queue.name
    retry = started and job.should_retry
    with queue.connection.pipeline() as pipe:
        execution.delete(job=job, pipeline=pipe)
        if retry:
            job.retry(queue, pipe)
        elif started:
            job.set_status(JobStatus.FAILED, pipeline=pipe)
            job._handle_failure("its worker died, and no retry is left", pipe)
        execute(pipe, _owned([held]))
    return _release_others(queue, job, dependents=not retry) if started else []


def _started(queue: FeedbackQueue) -> StartedJobRegistry:
    return StartedJobRegistry(queue=queue, job_class=FeedbackJob, serializer=MsgpackSerializer)


def _begun(registry: StartedJobRegistry) -> list[tuple[bytes, str, str]]:
    """Entry, job id and execution id of all that has begun; an entry that is none of RQ's has some id of no job."""
    entries: Any = registry.connection.zrange(registry.key, 0, -1)
    return [(entry, *entry.decode(errors="replace").partition(":")[::2]) for entry in entries]


def _fetch(queue: FeedbackQueue, ids: Sequence[str]) -> list[FeedbackJob | None]:
    """As RQ's fetch_many, but a key of a wrong type is no job, rather than an error."""
    with queue.connection.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(FeedbackJob.key_for(job_id))
        answers = pipe.execute(raise_on_error=False)
    jobs: list[FeedbackJob | None] = []
    for job_id, fields in zip(ids, answers, strict=True):
        if isinstance(fields, Exception) and retryable(fields):
            raise fields
        job = None
        if isinstance(fields, dict) and fields and ID_PATTERN.fullmatch(job_id):
            job = FeedbackJob(job_id, connection=queue.connection, serializer=MsgpackSerializer)
            job.restore(fields)
        jobs.append(job)
    return jobs


def settle_recorded(queue: FeedbackQueue, results: dict[str, Any]) -> Callable[[Pipeline], None]:
    """For a batch a dead worker trained: a function that finishes its jobs on a pipeline, wherever they are now."""
    executions: dict[str, list[str]] = {}
    for _, job_id, execution_id in _begun(_started(queue)):
        executions.setdefault(job_id, []).append(execution_id)
    jobs = _fetch(queue, list(results))

    def settle(pipe: Pipeline) -> None:
        for job in jobs:
            if job is None:
                continue  # expired or deleted: the ledger alone remembers it
            job.origin = queue.name
            finish(queue, job, None, results[job.id], pipe)
            pipe.lrem(queue.key, 0, job.id)
            for execution_id in executions.get(job.id, []):
                Execution(execution_id, job.id, queue.connection).delete(job=job, pipeline=pipe)

    return settle


def heartbeat(worker: BaseWorker, batch: Sequence[Held], ttl: int) -> None:
    """Keep worker, jobs and executions alive in Redis for another `ttl` (worker) and `LEASE` (jobs) seconds."""
    with worker.connection.pipeline() as pipe:
        worker.heartbeat(ttl, pipeline=pipe)
        for held in batch:
            if held.execution:
                held.execution.heartbeat(held.job.started_job_registry, LEASE, pipeline=pipe)
                held.job.heartbeat(now(), LEASE, pipeline=pipe, xx=True)
        created = execute(pipe, _owned(batch))[0][0]
    if created:  # the worker's hash had expired (Redis was away): say again who we are
        with worker.connection.pipeline() as pipe:
            pipe.hset(worker.key, mapping=worker.serialize())
            worker_registration.register(worker, pipe)
            pipe.expire(worker.key, ttl)
            pipe.execute()


def enqueue_due(queue: FeedbackQueue) -> int:
    """Queue the retries whose time has come, as RQ's forked scheduler would; returns how many."""
    registry = ScheduledJobRegistry(queue=queue, job_class=FeedbackJob, serializer=MsgpackSerializer)
    due: Any = registry.connection.zrangebyscore(registry.key, 0, time.time(), start=0, num=1000)
    if not due:
        return 0
    jobs = _fetch(queue, [entry.decode(errors="replace") for entry in due])
    with queue.connection.pipeline() as pipe:
        pipe.zrem(registry.key, *due)
        for job in jobs:
            if job is not None:
                queue._enqueue_job(job, pipeline=pipe, at_front=job.should_enqueue_at_front())
        pipe.execute()
    return len(due)


def clean(queue: FeedbackQueue) -> str | None:
    """RQ's periodic maintenance of registries and of workers that are gone. Returns what it stumbled over."""
    try:
        clean_registries(queue)
        worker_registration.clean_worker_registry(queue)
    except Exception as error:
        if retryable(error):
            raise
        return f"RQ's maintenance broke off ({type(error).__name__}): a key of another queue or job is broken"
    return None
