"""A transcript as an RQ job: how it is queued exactly once, and how Redis' answers read. Shared by both clients.

Must not know: how to talk to Redis (client.py blocks, aclient.py awaits), the worker.
Invariants: an id is queued only if neither its job nor the permanent ledger knows it, which is decided under WATCH and
done in one MULTI, so that racing producers cannot both win; no script runs, so that a producer's Redis user needs none;
a job's description never holds the transcript; no text here holds a password or a transcript.
RQ's parts used (checked on rq 3.0.0): `Job.create`, `Job.to_dict`, `Result.restore`, and the rule that queueing a job
is its hash and its id on the queue's list. (The queue's name in `rq:queues`, for RQ's tools, is the worker's to add.)
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis
from rq import Retry
from rq.job import Job, JobStatus
from rq.results import Result

from producer import keys
from producer.connection import DEFAULT_URL as DEFAULT_URL
from producer.connection import block_ms as block_ms
from producer.connection import connect as connect
from producer.connection import redis_errors as redis_errors
from producer.connection import resolve_url as resolve_url
from producer.connection import safe_url as safe_url
from producer.errors import (
    QueueUnavailable as QueueUnavailable,
)
from producer.errors import (
    TandemError,
)
from producer.errors import (
    TranscriptFailed as TranscriptFailed,
)
from producer.errors import (
    UnknownTranscript as UnknownTranscript,
)
from producer.errors import (
    WaitTimeout as WaitTimeout,
)
from producer.serializer import MsgpackSerializer
from producer.transcript import InvalidTranscript, Transcript

ACL = (
    "resetchannels -@all +watch +unwatch +multi +exec +exists +hmget +hget +hgetall +get +xrevrange +xread"
    " %R~rq:job:* %R~rq:results:* %R~weights:*"
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

CHUNK_JOBS = 100
CHUNK_BYTES = 8 * 1024 * 1024
"""A pipeline is sent when either is reached."""

ATTEMPTS = 100
"""How often a transaction is begun anew because another client changed one of its jobs meanwhile."""


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of one transcript.

    id: the transcript's and its job's. new: queued by this very call. version: the one that contains it, if trained.
    """

    id: str
    new: bool
    version: int | None
    _load: "Callable[[], Job | None] | None" = field(default=None, repr=False, compare=False)

    @property
    def job(self) -> Job | None:
        """The RQ job; for a known id one round trip, None once it has expired. Not on the async client."""
        if self._load is None:
            raise TandemError("an AsyncProducer's result has no RQ job, which would block: use status() or wait()")
        return self._load()


@dataclass(frozen=True, slots=True)
class Status:
    """Where a transcript is. state: RQ's word (queued, started, finished, failed, canceled, ...) or "unknown".

    version: the version that contains it. reason: why it failed, one line.
    """

    id: str
    state: str
    version: int | None = None
    reason: str | None = None


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
        """Queue on `pipe` what makes it a queued job. The push comes first: where it fails, no hash is left alone."""
        pipe.rpush(QUEUE_KEY, self.id)
        pipe.hset(self.job.key, mapping=self.fields)


class Chunk:
    """Some submissions on their way into the queue, one optimistic transaction; both clients talk to Redis about it:

        WATCH keys · HMGET ledger ids -> trained() · EXISTS keys: if any, UNWATCH, EXISTS of each -> queued_before()
        MULTI, write(), EXEC -> done(); a WatchError: all again

    An id that comes twice is queued once.
    """

    def __init__(self, items: list[Submission]) -> None:
        self._items = items
        self._left: dict[str, Submission] = {}
        for item in items:
            self._left.setdefault(item.id, item)
        self._version: dict[str, int] = {}
        self._new: set[int] = set()

    @property
    def ids(self) -> list[str]:
        """Those that are not settled yet."""
        return list(self._left)

    @property
    def keys(self) -> list[str]:
        return [item.job.key for item in self._left.values()]

    def trained(self, versions: list[Any]) -> None:
        """The ledger's answers for `ids`."""
        known = {id: int(version) for id, version in zip(self.ids, versions, strict=True) if version is not None}
        self._version |= known
        self._settle(known)

    def queued_before(self, exists: list[int]) -> None:
        """Redis' answers for `keys`. An id made up here can exist only because the answer to an EXEC was lost."""
        present = [item for item, there in zip(list(self._left.values()), exists, strict=True) if there]
        self._new |= {id(item) for item in present if item.made_up}
        self._settle(item.id for item in present)

    def write(self, pipe: Any) -> None:
        for item in self._left.values():
            item.write(pipe)

    def done(self) -> None:
        """EXEC went through."""
        self._new |= {id(item) for item in self._left.values()}
        self._left = {}

    def _settle(self, ids: Iterable[str]) -> None:
        gone = set(ids)
        self._left = {id: item for id, item in self._left.items() if id not in gone}

    def outcomes(self, load: "Callable[[Submission, bool], Callable[[], Job | None]] | None") -> list[Enqueued]:
        """In the order of the items. load: what `Enqueued.job` calls, for a submission and whether it is new."""
        found = []
        for item in self._items:
            new = id(item) in self._new
            found.append(Enqueued(item.id, new, self._version.get(item.id), load and load(item, new)))
        return found


def contended() -> QueueUnavailable:
    return QueueUnavailable(
        f"other clients changed the same jobs during each of {ATTEMPTS} attempts to queue them: try again, or give the"
        " transcripts other ids"
    )


def submission(transcript: Transcript, connection: redis.Redis) -> Submission:
    """`connection` is what RQ's Job keeps for later; nothing is sent here."""
    job_id = transcript.id or uuid.uuid4().hex
    job = Job.create(
        keys.FUNCTION,
        args=(transcript.to_dict(meta=False),),
        kwargs={},
        connection=connection,
        id=job_id,
        origin=keys.QUEUE,
        status=JobStatus.QUEUED,
        description=f"transcript {job_id}",
        meta=transcript.meta,
        timeout=keys.JOB_TIMEOUT,
        result_ttl=keys.RESULT_TTL,
        failure_ttl=keys.FAILURE_TTL,
        retry=Retry(max=keys.MAX_RETRIES),
        serializer=MsgpackSerializer,
    )
    job.enqueued_at = datetime.now(UTC)
    fields = {name: value for name, value in job.to_dict().items() if value is not None}
    return Submission(job, transcript.id is None, fields, len(fields["data"]) + 1024)


def collect(
    transcripts: Iterable[Transcript | dict[str, Any]], connection: redis.Redis
) -> tuple[list[Submission], dict[int, InvalidTranscript]]:
    """What can be sent, in order, and, by its place in the input, what cannot."""
    ready: list[Submission] = []
    refused: dict[int, InvalidTranscript] = {}
    for place, item in enumerate(transcripts):
        try:
            transcript = item if isinstance(item, Transcript) else Transcript.from_dict(item)
        except InvalidTranscript as error:
            refused[place] = error
        else:
            ready.append(submission(transcript, connection))
    return ready, refused


def merge(sent: list[Enqueued], refused: dict[int, InvalidTranscript]) -> list[Enqueued | InvalidTranscript]:
    """The outcomes in the order of the input."""
    rest = iter(sent)
    return [refused[place] if place in refused else next(rest) for place in range(len(sent) + len(refused))]


def chunks(submissions: list[Submission]) -> Iterator[list[Submission]]:
    chunk: list[Submission] = []
    size = 0
    for item in submissions:
        if chunk and (len(chunk) == CHUNK_JOBS or size + item.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item.size
    if chunk:
        yield chunk


def results_key(job_id: str) -> str:
    """The stream RQ adds to when a job ends, in the transaction that ends it."""
    return str(Result.get_key(job_id))


def read_commands(pipe: Any, job_id: str) -> None:
    """Queue the reads that `status_of` understands, for one MULTI."""
    pipe.hget(keys.LEDGER, job_id)
    pipe.hget(Job.key_for(job_id), "status")
    pipe.xrevrange(results_key(job_id), count=1)


def status_of(job_id: str, replies: list[Any], connection: redis.Redis) -> tuple[Status, str]:
    """The status, and the id of the last entry of the job's result stream: where a blocking read goes on."""
    version, raw_state, results = replies
    last = results[0][0].decode() if results else "0-0"
    if version is not None:
        return Status(job_id, "finished", int(version)), last
    state = raw_state.decode() if raw_state else "unknown"
    reason = None
    if state == "failed" and results:
        result = Result.restore(job_id, last, results[0][1], connection, serializer=MsgpackSerializer)
        lines = (result.exc_string or "").strip().splitlines()
        reason = lines[-1][:500] if lines else None
    return Status(job_id, state, None, reason), last


def settled(status: Status) -> int | None:
    """The version of a trained transcript, None while it may still be trained. Raises if it never will be."""
    if status.version is not None:
        return status.version
    if status.state == "unknown":
        raise UnknownTranscript(f"no transcript {status.id!r}: it was never queued here, or its job was deleted")
    if status.state == "failed":
        raise TranscriptFailed(f"transcript {status.id} failed: {status.reason or 'see its job in tandem dashboard'}")
    if status.state in ("canceled", "stopped"):
        raise TranscriptFailed(f"transcript {status.id} was {status.state}; requeue it in tandem dashboard")
    if status.state == "finished":
        raise TranscriptFailed(f"transcript {status.id} finished, but the ledger does not know it: see tandem status")
    return None


def timed_out(status: Status, timeout: float) -> WaitTimeout:
    return WaitTimeout(
        f"transcript {status.id} is still {status.state} after {timeout:g} s; wait longer, or see whether a worker runs"
        " (tandem status)"
    )
