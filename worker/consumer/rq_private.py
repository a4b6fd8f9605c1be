"""What Tandem uses of RQ beyond what RQ documents, all of it, checked when a queue is opened (rq 3.0.0).

Invariants: no name of a key or a queue comes out of a job's fields; functions that write queue their commands on the
pipeline they are given. RQ's own ends of a job (`handle_job_failure`, registries' `cleanup`) are not used: they queue
dependents and rate-limited jobs wherever the jobs' hashes say, and a producer writes those hashes.
"""

import re
import signal
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import redis
import rq
import rq.serializers
from redis.client import Pipeline
from rq import worker_registration
from rq.exceptions import StopRequested
from rq.executions import Execution, ExecutionRegistry
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.results import Result
from rq.utils import now
from rq.worker import SimpleWorker

from producer.errors import TandemError
from producer.serializer import MsgpackSerializer

__all__ = ["Execution"]

LISTEN = 0.2
"""Seconds between two looks of the thread that listens for RQ's commands whether the worker ends."""
REDIS_SECONDS = 15
"""How long Redis may take to answer, unless the connection allows more."""

PRIVATE_NAMES: list[tuple[Any, str]] = [
    *((Job, name) for name in ("restore", "to_dict", "save", "cleanup", "prepare_for_execution", "get_retry_interval")),
    *((Queue, name) for name in ("push_job_id", "intermediate_queue_key", "schedule_job", "redis_queues_keys")),
    *((Execution, name) for name in ("create", "delete", "heartbeat", "key")),
    *((ExecutionRegistry, "key_template"), (Result, "create"), (Result, "get_key")),
    *((SimpleWorker, name) for name in ("bootstrap", "teardown", "check_for_suspension", "heartbeat", "serialize")),
    *((SimpleWorker, name) for name in ("register_death", "set_state", "should_run_maintenance_tasks")),
    *((SimpleWorker, name) for name in ("_install_signal_handlers", "request_stop", "increment_failed_job_count")),
    *((SimpleWorker, name) for name in ("subscribe", "unsubscribe", "_pubsub_exception_handler", "handle_payload")),
    *((worker_registration, name) for name in ("register", "clean_worker_registry")),
    (rq.serializers.DefaultSerializer, "loads"),
]


def check_rq() -> None:
    """Raise `TandemError` unless this is an RQ whose private parts we know."""
    if tuple(int(part) for part in re.findall(r"\d+", rq.VERSION)[:2]) != (3, 0):
        raise TandemError(
            f"rq {rq.VERSION} is installed; Tandem's worker works with rq>=3.0,<3.1: pip install 'rq>=3.0,<3.1'"
        )
    missing = [f"{owner.__name__}.{name}" for owner, name in PRIVATE_NAMES if not hasattr(owner, name)]
    if missing:
        raise TandemError(f"rq {rq.VERSION} lacks {', '.join(missing)}, which Tandem needs: pip install rq==3.0.0")


def never_unpickle() -> None:
    """Make msgpack RQ's default in this process: RQ falls back on its default in places that take no serializer."""
    rq.serializers.DefaultSerializer.dumps = staticmethod(MsgpackSerializer.dumps)  # type: ignore[assignment]
    rq.serializers.DefaultSerializer.loads = staticmethod(MsgpackSerializer.loads)  # type: ignore[assignment]


class RqWorker(SimpleWorker):
    """An RQ worker as RQ's tools see it: it has a name, a state, a heartbeat and a pub/sub channel for commands. How it
    works is for the subclass. ttl: seconds after which RQ's tools no longer list it when it is silent."""

    connection_timeout = REDIS_SECONDS  # type: ignore[assignment]

    def __init__(self, queue: Queue, connection: redis.Redis, name: str | None, *, ttl: int) -> None:
        super().__init__(
            [queue],
            name=name,
            connection=connection,
            job_class=queue.job_class,
            queue_class=type(queue),
            serializer=MsgpackSerializer,  # type: ignore[arg-type]
            worker_ttl=ttl,
            log_job_description=False,
        )
        self._handlers: dict[signal.Signals, Any] = {}
        self._unsubscribed = threading.Event()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal, or RQ's shutdown command, asked this worker to end."""
        return bool(self._stop_requested)

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        self._stop_requested = value

    def begin_life(self, logging_level: str) -> None:
        """Register, listen for RQ's commands, take SIGTERM and SIGINT (in the main thread)."""
        self.bootstrap(logging_level)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            self._install_signal_handlers()

    def subscribe(self) -> None:
        """Listen for RQ's commands in a thread, as RQ does, but one that looks often whether it shall end."""
        self._unsubscribed.clear()
        self.pubsub = self.connection.pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload})
        handler: Any = self._pubsub_exception_handler
        thread: Any = self.pubsub.run_in_thread(sleep_time=LISTEN, daemon=True, exception_handler=handler)
        self.pubsub_thread = thread

    def unsubscribe(self) -> None:
        """End that thread, also where Redis is away. Idempotent.

        RQ asks Redis first; without an answer its thread logs an error every two seconds for ever.
        """
        thread: Any = self.pubsub_thread
        self.pubsub_thread = None  # type: ignore[assignment]
        if thread is not None:
            self._unsubscribed.set()
            thread.stop()
            thread.join(timeout=5)  # it closes its connection

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """An error in RQ's thread that listens for commands. That Redis is away, the main thread says. RQ's own ends
        the thread where Redis is only late, and nobody would hear a command any more."""
        if isinstance(exc, redis.ConnectionError | redis.TimeoutError) or self._unsubscribed.is_set():
            self._unsubscribed.wait(2.0)
            return
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def give_back_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def is_suspended_in_burst(self, burst: bool) -> bool:
        """Wait while `rq suspend` holds; in burst mode do not wait and return True."""
        try:
            self.check_for_suspension(burst)
            return False
        except StopRequested:
            return True

    def maintenance_is_due(self) -> bool:
        """Once at the start and then every ten minutes; asking counts as having done it."""
        if due := bool(self.should_run_maintenance_tasks):
            self.last_cleaned_at = now()  # type: ignore[assignment]
        return due

    def register_again(self, ttl: int) -> None:
        """Say once more who we are: the worker's hash had expired while Redis was away."""
        with self.connection.pipeline() as pipe:
            pipe.hset(self.key, mapping=self.serialize())
            worker_registration.register(self, pipe)
            pipe.expire(self.key, ttl)
            pipe.execute()


def bury_dead_workers(queue: Queue, name: str) -> None:
    """Unregister workers of this machine whose process is gone, and any of our own name: `rq info` would show them for
    minutes, and we could not have the name."""
    for worker in SimpleWorker.all(queue=queue):
        gone = worker.hostname == socket.gethostname() and not Path(f"/proc/{worker.pid}").exists()
        if gone or worker.name == name:
            worker.register_death()


def forget_workers_without_hash(queue: Queue) -> None:
    worker_registration.clean_worker_registry(queue)


# -- keys --


def keys_of(job: Job, execution: Execution | None) -> list[str]:
    """The Redis keys that only this job uses."""
    found = [job.key, ExecutionRegistry.key_template.format(job.id), Result.get_key(job.id)]
    return [*found, execution.key] if execution else found


def started(queue: Queue) -> list[tuple[bytes, str, str]]:
    """Entry, job id and execution id of all that has begun; an entry that is none of RQ's has some id of no job."""
    entries: Any = queue.connection.zrange(queue.started_job_registry.key, 0, -1)
    return [(entry, *entry.decode(errors="replace").partition(":")[::2]) for entry in entries]


# -- what becomes of a job, as commands on a pipeline --


def begin(worker: RqWorker, job: Job, lease: int, pipe: Pipeline) -> Execution:
    """`job` runs in `worker`, for `lease` seconds without a heartbeat."""
    execution = Execution.create(job, lease, pipe, worker_name=worker.name)
    job.prepare_for_execution(worker.name, pipeline=pipe)
    pipe.persist(job.key)
    return execution


def end_execution(job: Job, execution: Execution, pipe: Pipeline) -> None:
    execution.delete(job=job, pipeline=pipe)


def execution_of(queue: Queue, job_id: str, execution_id: str) -> Execution:
    return Execution(execution_id, job_id, queue.connection)


def heartbeat(job: Job, execution: Execution, lease: int, pipe: Pipeline) -> None:
    execution.heartbeat(job.started_job_registry, lease, pipeline=pipe)
    job.heartbeat(now(), lease, pipeline=pipe, xx=True)


def finish(job: Job, result: Mapping[str, Any], ttl: int, execution: Execution | None, pipe: Pipeline) -> None:
    """`job` ended well, with `result`; its hash is kept for `ttl` seconds (-1: for ever)."""
    job.ended_at = now()
    job.set_status(JobStatus.FINISHED, pipeline=pipe)
    job.save(pipeline=pipe, include_meta=False, include_result=False)
    Result.create(
        job, Result.Type.SUCCESSFUL, ttl, return_value=result, worker_name=job.worker_name or "", pipeline=pipe,
        **_times(job, execution),
    )  # fmt: skip
    job.finished_job_registry.add(job, ttl, pipe)
    if ttl > 0:
        pipe.expire(job.key, ttl)


def fail(worker: RqWorker | None, job: Job, reason: str, execution: Execution | None, pipe: Pipeline) -> None:
    """`job` failed for good."""
    job.set_status(JobStatus.FAILED, pipeline=pipe)
    job.failed_job_registry.add(job, ttl=job.failure_ttl, exc_string=reason, pipeline=pipe)
    Result.create(
        job, Result.Type.FAILED, job.failure_ttl, exc_string=reason, worker_name=worker.name if worker else "",
        pipeline=pipe, **_times(job, execution),
    )  # fmt: skip


def _times(job: Job, execution: Execution | None) -> dict[str, Any]:
    if execution is None:
        return {}
    return {
        "execution_id": execution.id,
        "execution_started_at": execution.created_at,
        "execution_ended_at": job.ended_at,
    }


def try_again(queue: Queue, job: Job, pipe: Pipeline) -> None:
    """Spend one of the job's retries: it is queued, or waits for as long as its intervals say."""
    wait = job.get_retry_interval()
    assert job.retries_left, "no retry is left"
    job.retries_left -= 1
    if wait:
        job.set_status(JobStatus.SCHEDULED, pipeline=pipe)
        queue.schedule_job(job, now() + timedelta(seconds=wait), pipeline=pipe)
    else:
        enqueue(queue, job, pipe, at_front=bool(job.enqueue_at_front_on_retry))


def enqueue(queue: Queue, job: Job, pipe: Pipeline, *, at_front: bool) -> None:
    """Queue a job that Redis has, on `queue` and on no other."""
    job.origin = queue.name
    job.enqueued_at = now()
    job.set_status(JobStatus.QUEUED, pipeline=pipe)
    job.save(pipeline=pipe)
    if job.ttl:
        job.cleanup(ttl=job.ttl, pipeline=pipe)
    queue.push_job_id(job.id, pipeline=pipe, at_front=at_front)


def put_back(queue: Queue, job: Job, pipe: Pipeline) -> None:
    """`job` stands at the front of the queue, as if it had never been taken."""
    pipe.lrem(queue.intermediate_queue_key, 0, job.id)
    pipe.lrem(queue.key, 0, job.id)
    pipe.zrem(queue.failed_job_registry.key, job.id)  # where an answer was lost
    job.set_status(JobStatus.QUEUED, pipeline=pipe)
    queue.push_job_id(job.id, pipeline=pipe, at_front=True)


def count_failed(worker: RqWorker, pipe: Pipeline) -> None:
    """The worker's own statistics, as `rq info` and the dashboard show them."""
    worker.increment_failed_job_count(pipe)


def count_finished(worker: RqWorker, count: int, seconds: float, pipe: Pipeline) -> None:
    pipe.hincrby(worker.key, "successful_job_count", count)
    pipe.hincrbyfloat(worker.key, "total_working_time", seconds)


def clean_registries(queue: Queue) -> None:
    """Forget finished and failed jobs whose time is over. (RQ's own function also queues other queues' jobs.)"""
    for kind in (queue.finished_job_registry, queue.failed_job_registry):
        kind.cleanup()
