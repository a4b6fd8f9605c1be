"""A job that cannot run code, its queue, and what a producer's hash may say.

Nothing here trains.
Invariants: no bytes from Redis are unpickled, imported or decompressed without a bound; a job that cannot be read is
still a job, with `defect` saying why, so that it can fail alone. A producer writes the hash, so the hash decides
nothing but how the transcript is trained: its queue is always ours, and keys named by it (other jobs that wait for this
one or that it waits for, groups, rate limits) are not read.
"""

import functools
import json
import time
import zlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

import redis
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import BaseRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry

from producer import keys
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from producer.transcript import ID_PATTERN, MAX_BYTES, MAX_META_BYTES, Transcript
from worker.consumer.rq_private import check_rq, never_unpickle

MAX_DATA = 2 * MAX_BYTES + MAX_META_BYTES
"""Bytes a job's payload may have once decompressed: what the producer accepts, and some."""
MAX_HASH = MAX_DATA + 1024 * 1024
"""Bytes a whole job may have in Redis; a larger one is not even fetched."""
MAX_RETRIES = 16
"""What a job's own count of retries is cut to."""
MAX_TTL = 10 * 365 * 24 * 3600
MAX_TIME = 64
"""Characters that a job's time may have."""
MAX_LIST = 100
"""Entries a job's list of retry intervals or of dependencies may have."""


class RefusedJobError(TandemError):
    """This job will never be trained as it stands: no retry."""


def _train_elsewhere(*_: Any) -> None:
    raise RefusedJobError(f"{keys.FUNCTION} is not run by a plain RQ worker: start `tandem worker`")


FUNCTIONS: dict[str, Callable[..., None]] = {keys.FUNCTION: _train_elsewhere}
"""The allow-list. A job's function name is looked up here and never imported."""


@functools.lru_cache(maxsize=16)
def _registry(kind: type[BaseRegistry], connection: redis.Redis) -> BaseRegistry:
    """Registries hold no state, and RQ makes several anew for each job: a tenth of the time of a batch."""
    return kind(keys.QUEUE, connection=connection, job_class=FeedbackJob, serializer=MsgpackSerializer)  # type: ignore


class FeedbackJob(Job):
    """An RQ job that cannot name code, keys or queues: its function comes from `FUNCTIONS`, its queue is ours, it has
    no callbacks, no webhooks, no rate limit.

    defect: why it can never be trained, or None; permanent: do not retry its failure.
    waits_for: ids of jobs that its hash says come first; only a deferred job's are looked at.
    Its description is always "transcript <id>": whatever else was set could be a text of the transcript.
    """

    defect: str | None = None
    permanent: bool = False
    waits_for: tuple[str, ...] = ()
    _stored: bool = False

    func = property(lambda self: self._allowed_function())  # type: ignore[assignment]
    success_callback = property(lambda self: None)  # type: ignore[assignment]
    failure_callback = property(lambda self: None)  # type: ignore[assignment]
    stopped_callback = property(lambda self: None)  # type: ignore[assignment]
    description = property(lambda self: f"transcript {self.id}", lambda self, value: None)
    origin = property(lambda self: keys.QUEUE, lambda self, value: None)  # type: ignore[assignment]
    started_job_registry = property(lambda self: _registry(StartedJobRegistry, self.connection))
    finished_job_registry = property(lambda self: _registry(FinishedJobRegistry, self.connection))
    failed_job_registry = property(lambda self: _registry(FailedJobRegistry, self.connection))

    def _allowed_function(self) -> Callable[..., None]:
        _check_call(self.func_name, self.instance)
        return FUNCTIONS[str(self.func_name)]

    def get_call_string(self) -> str:
        return f"{keys.FUNCTION}({self.id})"

    @property
    def should_retry(self) -> bool:
        return not self.permanent and super().should_retry

    def send_webhooks(self, *_: Any, **__: Any) -> None:
        """None, ever: a job must not choose what this machine connects to."""

    def restore(self, raw_data: dict[bytes, bytes]) -> None:
        """Read the job's hash; never raises for what it holds, sets `defect` instead."""
        fields = {name: raw_data[name.encode()] for name in _FIELDS if name.encode() in raw_data}
        for name, what in _FORBIDDEN.items():
            if raw_data.get(name.encode()):
                self.defect = f"the job has {what}: queue it without"
        data, problem = _inflate(fields.pop("data", b""))
        self.defect = self.defect or problem
        try:
            super().restore({name.encode(): value for name, value in fields.items()} | {b"data": b""})
        except Exception as error:
            self.defect = f"the job's fields in Redis cannot be read ({type(error).__name__})"
            self.meta = {}
            status = fields.get("status", b"")
            super().restore({b"data": b"", b"status": status if status in _STATUSES else b"queued"})
        self.data = data
        self.retries_left = None if self.retries_left is None else max(0, min(self.retries_left, MAX_RETRIES))
        self.result_ttl = _bounded_ttl(self.result_ttl)
        self.failure_ttl = _bounded_ttl(self.failure_ttl)
        self.ttl = _bounded_ttl(self.ttl)
        self.waits_for = _ids(raw_data.get(b"dependency_ids", b"[]"))
        self._restore_plain_values()
        self._stored = True

    def _restore_plain_values(self) -> None:
        """RQ keeps these as any JSON or msgpack value, and counts on them where a job is saved or tried again."""
        if not isinstance(self.meta, dict):
            self.meta = {}
        intervals, self.retry_intervals = self.retry_intervals, None
        if intervals is not None and not _is_list(intervals, lambda i: type(i) is int and 0 <= i <= MAX_TTL):
            self.defect = self.defect or f"the job's retry_intervals are not up to {MAX_LIST} whole seconds"
        elif intervals:
            self.retry_intervals = intervals

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        """As RQ's, without what is in Redis already and never changes: the payload is most of the job."""
        if not self._stored or self.defect:
            return super().to_dict(include_meta, include_result)
        kept, self.data = self.data, b""
        try:
            fields: dict[str, Any] = super().to_dict(include_meta, include_result)
        finally:
            self.data = kept
        return {name: value for name, value in fields.items() if name not in _UNCHANGING}

    def whole(self) -> dict[str, Any]:
        """All fields of the job's hash, for a Redis that lost it."""
        return super().to_dict(include_result=False)

    def transcript(self) -> Transcript:
        """Decode and validate. Raises `RefusedJobError` or `InvalidTranscript`."""
        if self.defect:
            raise RefusedJobError(self.defect)
        try:
            call = MsgpackSerializer.loads(self.data)
        except ValueError as error:
            raise RefusedJobError(f"the job's payload is not a msgpack call: {error}") from None
        if not isinstance(call, list) or len(call) != 4:
            raise RefusedJobError("the job's payload is not a call: function, instance, arguments, keywords")
        _check_call(*call[:2])
        if not isinstance(call[2], list) or len(call[2]) != 1 or not isinstance(call[2][0], dict) or call[3] != {}:
            raise RefusedJobError("the job's arguments are not one transcript map")
        transcript = Transcript.from_dict(call[2][0])
        if transcript.id not in (None, self.id):
            raise RefusedJobError(
                f"the transcript's id is not the job's id ({self.id}); the ledger could not tell them apart"
            )
        return transcript


def _check_call(function: Any, instance: Any) -> None:
    if not isinstance(function, str) or function not in FUNCTIONS:
        raise RefusedJobError(f"function {str(function)[:80]!r} is not allowed; the only one is '{keys.FUNCTION}'")
    if instance is not None:
        raise RefusedJobError("the job asks for a method of an instance; Tandem runs only its own function")


_UNCHANGING = {"data", "created_at", "group_id", "retry_intervals", "result_ttl", "failure_ttl"}
_UNCHANGING |= {"success_callback_name", "failure_callback_name", "stopped_callback_name"}  # empty, or a defect
_STATUSES = {status.value.encode() for status in JobStatus}
_FORBIDDEN = {
    "success_callback_name": "a success callback, and Tandem runs none",
    "failure_callback_name": "a failure callback, and Tandem runs none",
    "stopped_callback_name": "a stopped callback, and Tandem runs none",
    "webhooks": "webhooks, and Tandem calls none",
    "rate_limit_key": "a rate limit, and Tandem keeps none",
    "repeats_left": "repeats, and a transcript is trained once",
}
_FIELDS = (
    *("data", "created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat", "status", "meta"),
    *("timeout", "result_ttl", "failure_ttl", "ttl", "enqueue_at_front_on_retry"),
    *("number_of_retries", "retries_left", "retry_intervals"),
)
"""What is read of a hash. RQ has more fields: they name keys, queues, workers, or code."""


def _inflate(raw: bytes) -> tuple[bytes, str | None]:
    """A payload as RQ stores it (zlib, or plain) and, where it is too much, what is wrong."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(raw, MAX_DATA + 1)
    except zlib.error:
        data = raw
    if len(data) > MAX_DATA:
        return b"", f"the job's payload decompresses to more than {MAX_DATA} bytes"
    return data, None


def _bounded_ttl(ttl: int | None) -> int | None:
    """RQ's -1 (forever) stays; 0 and absurd values would break the transaction that settles the whole batch."""
    if ttl is None or ttl == -1:
        return ttl
    return max(60, min(ttl, MAX_TTL))


def _ids(raw: bytes) -> tuple[str, ...]:
    """A JSON list of job ids; anything else is none."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return ()
    fits = _is_list(value, lambda i: isinstance(i, str) and ID_PATTERN.fullmatch(i))
    return tuple(value) if fits else ()


def _is_list(value: Any, fits: Callable[[Any], Any]) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LIST and all(fits(entry) for entry in value)


def oldest_job_s(queue: Queue) -> float | None:
    """Seconds since the job at the front of `queue` was queued; None where there is none, or where its hash does not
    say it readably (a producer writes it)."""
    first: Any = queue.connection.lindex(queue.key, 0)
    if first is None:
        return None
    key = Job.key_for(first.decode(errors="replace"))
    try:
        length: Any = queue.connection.hstrlen(key, "enqueued_at")
        said: Any = queue.connection.hget(key, "enqueued_at") if 0 < length <= MAX_TIME else None
        return max(0.0, time.time() - datetime.fromisoformat(said.decode()).timestamp()) if said else None
    except (ValueError, OverflowError, redis.ResponseError):
        return None


class FeedbackQueue(Queue):
    """The queue of transcripts."""

    job_class = FeedbackJob


def open_queue(connection: redis.Redis) -> FeedbackQueue:
    """The queue `feedback` with our job class and serializer."""
    check_rq()
    never_unpickle()
    return FeedbackQueue(keys.QUEUE, connection=connection, job_class=FeedbackJob, serializer=MsgpackSerializer)
