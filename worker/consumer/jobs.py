"""A job that cannot run code, its queue, and the check that this is an RQ whose inside we know (rq 3.0.0).

With worker/consumer/transitions.py the only place that touches RQ beyond its documented interface.
Must not know: weights, steps, batches. Nothing here trains.
Invariants: no bytes from Redis are unpickled, imported or decompressed without a bound; a job that cannot be read is
still a job, with `defect` saying why, so that it can fail alone.
"""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any

import redis
import rq
import rq.serializers
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import BaseRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.worker import SimpleWorker

from producer import keys
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from producer.transcript import ID_PATTERN, MAX_BYTES, MAX_META_BYTES, Transcript

MAX_DATA = 2 * MAX_BYTES + MAX_META_BYTES
"""Bytes a job's payload may have once decompressed: what the producer accepts, and some."""
MAX_HASH = MAX_DATA + 1024 * 1024
"""Bytes a whole job may have in Redis; a larger one is not even fetched."""
MAX_RETRIES = 16
"""What a job's own count of retries is cut to."""
MAX_TTL = 10 * 365 * 24 * 3600
MAX_LIST = 100
"""Entries a job's list of retry intervals or of dependencies may have."""

PRIVATE_NAMES: list[tuple[Any, str]] = [
    (Job, "_handle_success"),
    (Job, "_handle_failure"),
    (Job, "retry"),
    (Job, "_deserialize_data"),
    (Job, "prepare_for_execution"),
    (Job, "restore"),
    (Job, "to_dict"),
    (Queue, "_enqueue_job"),
    (Queue, "push_job_id"),
    (Queue, "intermediate_queue_key"),
    (Queue, "enqueue_dependents"),
    (Execution, "create"),
    (Execution, "delete"),
    (Execution, "heartbeat"),
    (ExecutionRegistry, "remove"),
    (SimpleWorker, "handle_job_failure"),
    (SimpleWorker, "check_for_suspension"),
    (SimpleWorker, "register_death"),
    (SimpleWorker, "serialize"),
    (rq.serializers.DefaultSerializer, "loads"),
]


def check_rq() -> None:
    """Raise `TandemError` unless this is an RQ whose inside we know."""
    if tuple(int(part) for part in re.findall(r"\d+", rq.VERSION)[:2]) != (3, 0):
        raise TandemError(f"rq {rq.VERSION} is installed; Tandem works with rq>=3.0,<3.1: pip install 'rq>=3.0,<3.1'")
    missing = [f"{owner.__name__}.{name}" for owner, name in PRIVATE_NAMES if not hasattr(owner, name)]
    if missing:
        raise TandemError(f"rq {rq.VERSION} lacks {', '.join(missing)}, which Tandem needs: pip install rq==3.0.0")


def never_unpickle() -> None:
    """Make msgpack RQ's default in this process: RQ falls back on its default in places that take no serializer."""
    rq.serializers.DefaultSerializer.dumps = staticmethod(MsgpackSerializer.dumps)  # type: ignore[assignment]
    rq.serializers.DefaultSerializer.loads = staticmethod(MsgpackSerializer.loads)  # type: ignore[assignment]


class Refused(TandemError):
    """This job will never be trained as it stands: no retry."""


def _train_elsewhere(*_: Any) -> None:
    raise Refused(f"{keys.FUNCTION} is not run by a plain RQ worker: start `tandem worker`")


FUNCTIONS: dict[str, Callable[..., None]] = {keys.FUNCTION: _train_elsewhere}
"""The allow-list. A job's function name is looked up here and never imported."""


@functools.lru_cache(maxsize=16)
def _registry(kind: type[BaseRegistry], queue: str, connection: redis.Redis) -> BaseRegistry:
    """Registries hold no state, and RQ makes several anew for each job: a tenth of the time of a batch."""
    return kind(queue, connection=connection, job_class=FeedbackJob, serializer=MsgpackSerializer)  # type: ignore


class FeedbackJob(Job):
    """An RQ job that cannot name code: its function comes from `FUNCTIONS`, it has no callbacks and no webhooks.

    defect: why it can never be trained, or None; permanent: do not retry its failure.
    Its description is always "transcript <id>": whatever else was set could be a text of the transcript.
    """

    defect: str | None = None
    permanent: bool = False
    _stored: bool = False

    func = property(lambda self: self._allowed_function())  # type: ignore[assignment]
    success_callback = property(lambda self: None)  # type: ignore[assignment]
    failure_callback = property(lambda self: None)  # type: ignore[assignment]
    stopped_callback = property(lambda self: None)  # type: ignore[assignment]
    description = property(lambda self: f"transcript {self.id}", lambda self, value: None)
    started_job_registry = property(lambda self: _registry(StartedJobRegistry, self.origin, self.connection))
    finished_job_registry = property(lambda self: _registry(FinishedJobRegistry, self.origin, self.connection))

    def _allowed_function(self) -> Callable[..., None]:
        if not isinstance(self.func_name, str) or self.func_name not in FUNCTIONS:
            raise Refused(f"function {str(self.func_name)[:80]!r} is not allowed; the only one is '{keys.FUNCTION}'")
        if self.instance is not None:
            raise Refused("the job names an instance to call a method on; Tandem calls none")
        return FUNCTIONS[self.func_name]

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
        for name in _FORBIDDEN:
            if raw_data.get(name.encode()):
                self.defect = f"the job has a {name.replace('_name', '').replace('_', ' ')}; Tandem runs none"
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
        self._restore_lists()
        self.origin = self.origin or keys.QUEUE
        if self.repeats_left:
            self.defect = self.defect or "the job is to be repeated; a transcript is trained once"
        self._stored = True

    def _restore_lists(self) -> None:
        """RQ keeps these as any JSON or msgpack value, and counts on them where a job is saved or tried again."""
        if not isinstance(self.meta, dict):
            self.meta = {}
        intervals, self.retry_intervals = self.retry_intervals, None
        if intervals is not None and not _is_list(intervals, lambda i: type(i) is int and 0 <= i <= MAX_TTL):
            self.defect = self.defect or f"the job's retry_intervals are not up to {MAX_LIST} whole seconds"
        elif intervals:
            self.retry_intervals = intervals
        if not _is_list(self._dependency_ids, lambda i: isinstance(i, str) and ID_PATTERN.fullmatch(i)):
            self._dependency_ids = []
            self.defect = self.defect or f"the job's dependency_ids are not up to {MAX_LIST} job ids"

    def to_dict(self, include_meta: bool = True, include_result: bool = True) -> dict[str, Any]:
        """As RQ's, without what is in Redis already and never changes: the payload is most of the job."""
        if not self._stored or self.defect:
            return super().to_dict(include_meta, include_result)
        kept, self._data = self._data, b""
        try:
            fields: dict[str, Any] = super().to_dict(include_meta, include_result)
        finally:
            self._data = kept
        return {name: value for name, value in fields.items() if name not in _UNCHANGING}

    def transcript(self) -> Transcript:
        """Decode and validate. Raises `Refused`, `InvalidTranscript` or RQ's `DeserializationError`."""
        if self.defect:
            raise Refused(self.defect)
        self._deserialize_data()
        self._allowed_function()
        args, kwargs = self.args, self.kwargs
        if not isinstance(args, list) or len(args) != 1 or not isinstance(args[0], dict) or kwargs != {}:
            raise Refused("the job's arguments are not one transcript map")
        transcript = Transcript.from_dict(args[0])
        if transcript.id not in (None, self.id):
            raise Refused(f"the transcript's id is not the job's id ({self.id}); the ledger could not tell them apart")
        return transcript


_UNCHANGING = {"data", "created_at", "group_id", "retry_intervals", "result_ttl", "failure_ttl"}
_UNCHANGING |= {"success_callback_name", "failure_callback_name", "stopped_callback_name"}  # empty, or a defect
_STATUSES = {status.value.encode() for status in JobStatus}
_FORBIDDEN = ["success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks"]
_FIELDS = (
    *("data", "created_at", "origin", "worker_name", "enqueued_at", "started_at", "ended_at", "last_heartbeat"),
    *("group_id", "timeout", "result_ttl", "failure_ttl", "ttl", "status", "meta", "enqueue_at_front"),
    *("dependency_id", "dependency_ids", "allow_dependency_failures", "enqueue_at_front_on_retry"),
    *("number_of_retries", "retries_left", "retry_intervals", "repeats_left", "repeat_intervals"),
    *("rate_limit_key", "rate_limit_concurrency"),
)


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


def _is_list(value: Any, fits: Callable[[Any], Any]) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LIST and all(fits(entry) for entry in value)


class FeedbackQueue(Queue):
    """The queue of transcripts."""

    job_class = FeedbackJob


def open_queue(connection: redis.Redis) -> FeedbackQueue:
    """The queue `feedback` with our job class and serializer."""
    check_rq()
    never_unpickle()
    return FeedbackQueue(keys.QUEUE, connection=connection, job_class=FeedbackJob, serializer=MsgpackSerializer)
