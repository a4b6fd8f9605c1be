"""A transcript as an RQ job: its hash in Redis, and how what RQ keeps of a job reads. Shared by both clients.

Must not know: the worker.
Invariants: a job's description never holds the transcript; nothing here sends anything. RQ's parts used: `Job.create`,
`Job.to_dict`, `Job.fetch`, `Result.restore`, and the rule that queueing a job is its hash and its id on the queue's
list. (The queue's name in `rq:queues`, for RQ's tools, is the worker's to add.) A test runs the oldest and the newest
RQ that pyproject.toml allows.
"""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from rq.job import Job, JobStatus
from rq.results import Result

from . import keys
from .errors import QueueUnavailable as QueueUnavailable
from .errors import TranscriptFailed as TranscriptFailed
from .errors import TranscriptFailedError, UnknownTranscriptError, WaitTimeoutError
from .errors import UnknownTranscript as UnknownTranscript
from .errors import WaitTimeout as WaitTimeout
from .outcomes import Enqueued as Enqueued
from .outcomes import State, Status
from .serializer import MsgpackSerializer
from .transcript import Transcript

ACL = (
    "resetchannels -@all +ping +client|setname +watch +unwatch +multi +exec +exists +hmget +hget +hgetall +get"
    " +xrevrange +xread %R~rq:job:* %R~rq:results:* %R~weights:*"
    f" (-@all +hset %W~rq:job:*) (-@all +rpush %W~rq:queue:{keys.QUEUE})"
)
"""What a producer's Redis user needs, and all it gets: `ACL SETUSER app on >password` and this. Redis 7 or later.

It can queue transcripts and read versions, jobs and results. It cannot run scripts, set a version, touch the ledger,
pop, delete, publish, configure, or write any key but jobs' hashes and the end of this queue. It must write hashes, so
it can overwrite those of others: the worker believes nothing of a hash but the transcript in it.
A database other than 0 needs `+select` as well.
"""

QUEUE_KEY = f"rq:queue:{keys.QUEUE}"
QUEUES_KEY = "rq:queues"

NOWHERE = redis.Redis()
"""RQ's objects want a connection for later; this one is never used, so it never connects."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One transcript ready to be sent. fields: the job's hash; size: about how many bytes it takes to send."""

    job: Job
    made_up: bool
    fields: dict[str, Any]
    size: int

    @property
    def id(self) -> str:
        return str(self.job.id)

    def write(self, pipe: Any) -> None:
        """Queue on `pipe`, a transaction, what makes it a queued job."""
        pipe.rpush(QUEUE_KEY, self.id)
        pipe.hset(self.job.key, mapping=self.fields)


def submission(transcript: Transcript) -> Submission:
    """`transcript` as a job that can be queued; one without an id gets one."""
    job_id = transcript.id or uuid.uuid4().hex
    job = Job.create(
        keys.FUNCTION,
        args=(transcript.to_dict(meta=False),),
        kwargs={},
        connection=NOWHERE,
        id=job_id,
        origin=keys.QUEUE,
        status=JobStatus.QUEUED,
        description=f"transcript {job_id}",
        meta=transcript.meta,
        timeout=keys.JOB_TIMEOUT,
        result_ttl=keys.RESULT_TTL,
        failure_ttl=keys.FAILURE_TTL,
        serializer=MsgpackSerializer,
    )
    job.retries_left, job.retry_intervals = keys.MAX_RETRIES, [0]  # Job.create takes no `retry` before rq 3
    job.enqueued_at = datetime.now(UTC)
    fields = {name: value for name, value in job.to_dict().items() if value is not None}
    return Submission(job, transcript.id is None, fields, len(fields["data"]) + 1024)


def results_key(job_id: str) -> str:
    """The stream RQ adds to when a job ends, in the transaction that ends it."""
    return f"rq:results:{job_id}"


def failure_reason(job_id: str, entry: tuple[bytes, dict[bytes, bytes]]) -> str | None:
    """The last line of what RQ kept of a failure. entry: the newest of the job's result stream."""
    try:
        result = Result.restore(job_id, entry[0].decode(), entry[1], NOWHERE, serializer=MsgpackSerializer)
    except Exception:  # RQ checks nothing of what it reads: whatever is in Redis, a state is no crash
        return "what Redis has of its failure cannot be read"
    lines = (result.exc_string or "").strip().splitlines()
    return lines[-1][:500] if lines else None


def settled(status: Status) -> int | None:
    """The version of a trained transcript, None while it may still be trained. Raises if it never will be."""
    if status.version is not None:
        return status.version
    if status.state is State.UNKNOWN:
        raise UnknownTranscriptError(
            f"no transcript {status.id!r}: it was never queued here, or its job was deleted or evicted"
        )
    if status.state is State.LOST:
        raise TranscriptFailedError(
            f"transcript {status.id} is lost: {status.reason}. It is in no version; hand it in again"
        )
    if status.state is State.FAILED:
        raise TranscriptFailedError(
            f"transcript {status.id} failed: {status.reason or 'see its job in tandem dashboard'}"
        )
    if status.state in (State.CANCELED, State.STOPPED):
        raise TranscriptFailedError(f"transcript {status.id} was {status.state}; requeue it in tandem dashboard")
    if status.state is State.FINISHED:
        raise TranscriptFailedError(
            f"transcript {status.id} finished, but the ledger does not know it: see tandem status"
        )
    return None


def timed_out(status: Status, timeout: float) -> WaitTimeoutError:
    return WaitTimeoutError(
        f"transcript {status.id} is still {status.state} after {timeout:g} s; wait longer, or see whether a worker runs"
        " (tandem status)"
    )
