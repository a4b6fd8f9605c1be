"""The moves of a job on its way to a step, cut so that many jobs can share one round trip: take, begin, put back.

How a job ends is settlement.py's, what becomes of jobs in nobody's hands upkeep.py's.
Invariants: every function that writes is one transaction and may be repeated when its answer was lost; ids in RQ's
intermediate queue are exactly those taken and not yet begun; a job's hash is written whole or changed where it exists.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.client import Pipeline

from producer import keys
from producer.serializer import MsgpackSerializer
from producer.transcript import ID_PATTERN, MAX_ID
from worker.consumer import rq_private
from worker.consumer.jobs import MAX_HASH, FeedbackJob, FeedbackQueue
from worker.consumer.pipelines import merge, update_only
from worker.consumer.redis_errors import execute
from worker.consumer.rq_private import Execution, RqWorker

LEASE = 180
"""Seconds a begun job stays ours without a heartbeat."""


@dataclass(eq=False)
class JobInHand:
    """A job in this worker's hands. version: what the ledger knows of it; execution: set once begun; canceled: somebody
    canceled it through RQ."""

    job: FeedbackJob
    version: int | None = None
    execution: Execution | None = None
    prepared: Any = None
    prepare_s: float = 0.0
    canceled: bool = False

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


NO_JOB = "no such job"

# A job's hash as a list of fields and values; its size in bytes, more than `most`, where it is too large to be read.
_READ = """
local function read(key, most)
  local size, count = 0, redis.call('HLEN', key)
  if count > 200 then size = most + 1 else
    for _, field in ipairs(redis.call('HKEYS', key)) do size = size + #field + redis.call('HSTRLEN', key, field) end
  end
  if size <= most then return redis.call('HGETALL', key) end
  return size
end
"""

# Moves up to ARGV[1] ids from the queue to the intermediate queue and reads their jobs, in one round trip. Ids that
# are no job ids, or have no job, are dropped. Reply per id: {id, ledger version or nil, fields | size | why dropped,
# whether RQ's registry of canceled jobs has it}.
_TAKE = (
    _READ
    + """
local out = {}
local function drop(id, why)
  redis.call('LREM', KEYS[2], 1, id)
  out[#out + 1] = {string.sub(id, 1, ARGV[3]), false, why, 0}
end
local function look(id)
  if #id > tonumber(ARGV[3]) or not string.find(id, '^[A-Za-z0-9_-]+$') then return drop(id, 'no valid job id') end
  local key = ARGV[4] .. id
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'hash' then return drop(id, 'no such job') end
  local body = read(key, tonumber(ARGV[2]))
  local canceled = redis.call('ZSCORE', KEYS[4], id)
  out[#out + 1] = {id, redis.call('HGET', KEYS[3], id), body, canceled and 1 or 0}
end
if ARGV[5] ~= '' then look(ARGV[5]) end
for _ = 1, tonumber(ARGV[1]) do
  local id = redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
  if not id then break end
  look(id)
end
return out
"""
)

# The jobs of KEYS as `read` has them; nil for what is no hash.
_FETCH = (
    _READ
    + """
local out = {}
for i, key in ipairs(KEYS) do
  out[i] = redis.call('TYPE', key).ok == 'hash' and read(key, tonumber(ARGV[1]))
end
return out
"""
)


def announce(queue: FeedbackQueue) -> None:
    """Name the queue among RQ's, for its tools (`rq info`, the dashboard). A producer has no right to do it."""
    queue.connection.sadd(queue.redis_queues_keys, queue.key)


def take(queue: FeedbackQueue, count: int, wait: float) -> tuple[list[JobInHand], list[Dropped]]:
    """Up to `count` jobs off the queue, waiting up to `wait` seconds (0: not at all) for the first.

    Returns the jobs, oldest first, and the ids that were dropped because no job belongs to them.
    """
    rows = _take(queue, count, b"")
    if not rows and wait > 0:
        first: Any = queue.connection.blmove(queue.key, queue.intermediate_queue_key, max(wait, 0.01))  # type: ignore
        rows = _take(queue, count - 1, first) if first else []
    held: list[JobInHand] = []
    dropped: list[Dropped] = []
    for raw_id, version, body, canceled in rows:
        if isinstance(body, bytes):
            dropped.append(Dropped(raw_id, body.decode()))
            continue
        job = _job(queue, raw_id.decode(), body)
        # A hash alone is not believed, since a producer writes it; nor the registry alone, which RQ does not tidy up
        # when a canceled job is queued again.
        gone = bool(canceled) and job.get_status(refresh=False) == "canceled"
        held.append(JobInHand(job, int(version) if version and version.isdigit() else None, canceled=gone))
    return held, dropped


def _take(queue: FeedbackQueue, count: int, first: bytes) -> list[tuple[bytes, bytes | None, Any, int]]:
    script = queue.connection.register_script(_TAKE)
    names = [queue.key, queue.intermediate_queue_key, keys.LEDGER, queue.canceled_job_registry.key]
    result: Any = script(keys=names, args=[count, MAX_HASH, MAX_ID, FeedbackJob.redis_job_namespace_prefix, first])
    return result


def _job(queue: FeedbackQueue, job_id: str, body: Any) -> FeedbackJob:
    job = FeedbackJob(job_id, connection=queue.connection, serializer=MsgpackSerializer)
    if isinstance(body, int):
        job.restore({b"data": b""})
        job.defect = f"the job is larger in Redis than {MAX_HASH} bytes"
    else:
        job.restore(dict(zip(body[::2], body[1::2], strict=True)))
    return job


def fetch(queue: FeedbackQueue, ids: Sequence[str]) -> list[FeedbackJob | None]:
    """The jobs of `ids`, None for what is no job; one that is too large is read no further than that."""
    if not ids:
        return []
    script = queue.connection.register_script(_FETCH)
    bodies: Any = script(keys=[FeedbackJob.key_for(job_id) for job_id in ids], args=[MAX_HASH])
    found = zip(ids, bodies, strict=True)
    return [_job(queue, job_id, body) if body and ID_PATTERN.fullmatch(job_id) else None for job_id, body in found]


def owned(batch: Iterable[JobInHand]) -> dict[str, str]:
    """The Redis keys that only one job uses -> that job's id."""
    return {key: held.id for held in batch for key in rq_private.keys_of(held.job, held.execution)}


def job_keys(batch: Iterable[JobInHand]) -> set[str]:
    return {held.job.key for held in batch}


def restore_lost(connection: redis.Redis, batch: Sequence[JobInHand], pipe: Pipeline) -> None:
    """Queue on `pipe` the whole hash of every job that Redis no longer has: we hold the transcript, and an id in the
    queue without it would be dropped."""
    with connection.pipeline(transaction=False) as asked:
        for held in batch:
            asked.exists(held.job.key)
        there = asked.execute()
    for held, exists in zip(batch, there, strict=True):
        if not exists:
            whole: dict[Any, Any] = held.job.whole()
            pipe.hset(held.job.key, mapping=whole)


def begin(worker: RqWorker, queue: FeedbackQueue, batch: Sequence[JobInHand]) -> dict[str, str]:
    """Mark jobs as started by `worker`, out of the intermediate queue, in one transaction.

    Returns, per job with a key of a wrong type, that key: it has begun like the others, but must be failed.
    """
    with worker.connection.pipeline() as pipe:
        for held in batch:
            held.execution = rq_private.begin(worker, held.job, LEASE, pipe)
            pipe.lrem(queue.intermediate_queue_key, 1, held.id)
        worker.set_state("busy", pipeline=pipe)
        merge(pipe)
        update_only(pipe, job_keys(batch))
        _, broken = execute(pipe, owned(batch))
    for held in batch:
        assert held.execution is not None
        worker.executions[held.execution.id] = held.execution
    return broken


def forget(queue: FeedbackQueue, held: JobInHand) -> None:
    """Drop a second copy of an id, or a canceled job, that was taken and never begun."""
    queue.connection.lrem(queue.intermediate_queue_key, 1, held.id)


def put_back(worker: RqWorker, queue: FeedbackQueue, batch: list[JobInHand]) -> None:
    """Undo `begin`: the jobs are queued again, at the front, in order, with no retry spent. May be repeated."""
    with worker.connection.pipeline() as pipe:
        restore_lost(worker.connection, batch, pipe)
        first = len(pipe.command_stack)
        for held in reversed(batch):
            rq_private.put_back(queue, held.job, pipe)
            if held.execution:
                rq_private.end_execution(held.job, held.execution, pipe)
        update_only(pipe, job_keys(batch), first)
        execute(pipe, owned(batch))
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


def heartbeat(worker: RqWorker, batch: Sequence[JobInHand], ttl: int) -> None:
    """Keep worker, jobs and executions alive in Redis for another `ttl` (worker) and `LEASE` (jobs) seconds. What Redis
    lost stays lost: a heartbeat alone makes neither a job nor an execution."""
    with worker.connection.pipeline() as pipe:
        worker.heartbeat(ttl, pipeline=pipe)
        hashes = job_keys(batch)
        for held in batch:
            if held.execution:
                rq_private.heartbeat(held.job, held.execution, LEASE, pipe)
                hashes.add(held.execution.key)
        update_only(pipe, hashes)
        created = execute(pipe, owned(batch))[0][0]
    if created:  # the worker's hash had expired (Redis was away): say again who we are
        worker.register_again(ttl)
