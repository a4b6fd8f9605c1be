"""The drain: an RQ worker that takes transcripts in micro-batches, has a step train them, and settles each job.

Must not know: torch, vLLM; RQ's inside (worker/consumer/jobs.py and worker/consumer/transitions.py have all of that).
Invariants:
- No job is lost: it is in the queue, in RQ's intermediate queue, started and heart-beaten, or settled; a killed
  worker's jobs are put back by the next worker when it starts.
- No job is trained twice: ids in the ledger are acknowledged with their version; a batch holds an id once; a version
  is committed before the next batch is trained.
- Nothing interrupts a step: signals only ask the loop to end.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.client import Pipeline
from rq.exceptions import StopRequested
from rq.utils import now
from rq.worker import SimpleWorker

from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.config.protocol import Prepared, Step, Torn, Unavailable, Update
from worker.consumer import transitions
from worker.consumer.batcher import Intake
from worker.consumer.events import Hooks, LogHooks, logger, told
from worker.consumer.heartbeat import Pulse
from worker.consumer.jobs import FeedbackJob, FeedbackQueue, open_queue
from worker.consumer.pipelines import merge, own_words, retryable
from worker.consumer.transitions import Held
from worker.consumer.worker_lock import WorkerLock
from worker.utils.fault_injection import point
from worker.versions import ledger
from worker.versions.eviction_watch import EvictionWatch

__all__ = ["BatchWorker", "CommitPending", "FeedbackJob", "FeedbackQueue", "Prepared", "Step", "Torn", "Unavailable"]
__all__ += ["Update"]

WORKER_TTL = 60
"""Seconds after which RQ's tools no longer list a silent worker."""
REDIS_SECONDS = 15
"""How long Redis may take to answer, unless the connection allows more."""
STOP_GRACE = 15.0
"""Seconds a stopping worker goes on trying to tell Redis of a version."""
LISTEN = 0.2
"""Seconds between two looks of the thread that listens for RQ's commands whether the worker ends."""
SICK_AFTER = 3
"""Transcripts on which a step may break one after the other, each alone, before it is the step that is to blame."""


class CommitPending(TandemError):
    """The worker had to stop with a version in the weights that Redis does not know yet."""


class BatchWorker(SimpleWorker):
    """An RQ worker of queue `feedback` that trains many jobs as one version.

    step: what trains. max_jobs, max_tokens, linger (seconds after the first job): whichever fills first ends a batch.
    prepare_limit: whole seconds one transcript may take to prepare. heartbeat: seconds between signs of life.
    hooks: told of what happens. lock: the worker lock, when the caller took it already (to reconcile under it).
    check: called between batches, about once a second; raises `Unavailable` when no step can run any more.
    """

    job_class = FeedbackJob
    queue_class = FeedbackQueue
    connection_timeout = REDIS_SECONDS  # type: ignore[assignment]

    def __init__(
        self,
        connection: redis.Redis,
        step: Step[Any],
        *,
        name: str | None = None,
        max_jobs: int = 32,
        max_tokens: int = 65536,
        linger: float = 1.0,
        prepare_limit: int = 60,
        heartbeat: float = 10.0,
        hooks: Sequence[Hooks] | None = None,
        lock: WorkerLock | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.queue = open_queue(connection)
        super().__init__(
            [self.queue],
            name=name,
            connection=connection,
            job_class=FeedbackJob,
            queue_class=FeedbackQueue,
            serializer=MsgpackSerializer,  # type: ignore[arg-type]
            worker_ttl=WORKER_TTL,
            log_job_description=False,
        )
        self.step = step
        self.check = check
        self.hooks: list[Hooks] = list(hooks) if hooks is not None else [LogHooks()]
        self.lock = lock or WorkerLock(connection, self.name)
        settling = threading.RLock()
        limits: dict[str, Any] = {"max_jobs": max_jobs, "max_tokens": max_tokens, "linger": linger}
        self.intake = Intake(
            self, self.queue, step, prepare_limit=prepare_limit, tell=self.tell, settling=settling, **limits
        )
        self.settling = settling
        self._handlers: dict[signal.Signals, Any] = {}
        self.pulse = Pulse(heartbeat, self.beat)
        self._unsubscribed = threading.Event()
        self.evictions = EvictionWatch(connection, lambda problem: self.tell("on_notice", problem))

    def work(  # type: ignore[override]
        self, burst: bool = False, max_versions: int | None = None, logging_level: str = "WARNING", **_: Any
    ) -> int:
        """Drain until asked to stop (SIGTERM, SIGINT, RQ's shutdown command); burst: until the queue is empty.

        Returns how many versions were trained. Raises TandemError (WorkerBusy, LockLost, Torn, Unavailable,
        LedgerMismatch, CommitPending) when the worker must not go on, and RedisError only before it has begun.
        """
        if self.lock.held:
            self.lock.renew()  # the caller may have taken minutes between taking it and this
        elif said := self.lock.acquire():
            self.tell("on_notice", said)
        self.versions = 0
        self.broken_on: list[str] = []
        try:
            transitions.announce(self.queue)
            recovered, wrong = transitions.recover(self.queue, self.name)
            if recovered:
                wrong.append(f"put back {recovered} jobs that a dead worker held")
            for sentence in wrong:
                self.tell("on_notice", sentence)
            self.bootstrap(logging_level)
            self._install_signal_handlers()
            self.pulse.start()
            self.tell("on_start")
            while not self._stop_requested and (max_versions is None or self.versions < max_versions):
                try:
                    self.housekeeping(burst)
                    if self.intake.collect(burst):
                        self.linger_s = time.monotonic() - self.intake.first
                        self.train(list(self.intake.batch))
                    elif burst and not transitions.enqueue_due(self.queue):
                        break
                except StopRequested:  # suspended in burst mode
                    break
                except redis.RedisError as error:
                    if not retryable(error):
                        raise
                    self.resync(error)
            self.put_back_rest()
            return self.versions
        except Unavailable:
            self.put_back_rest()
            raise
        finally:
            self.leave()

    def housekeeping(self, burst: bool) -> None:
        """Between batches: our lock, the step, suspension (`rq suspend`), retries that are due, RQ's maintenance, and
        whether Redis may evict what is queued."""
        self.pulse.check()
        self.evictions.look()
        if self.check is not None:
            self.check()
        self.check_for_suspension(burst)
        transitions.enqueue_due(self.queue)
        if self.should_run_maintenance_tasks:
            if said := transitions.clean(self.queue):
                self.tell("on_notice", said)
            self.last_cleaned_at = now()  # type: ignore[assignment]

    def train(self, batch: list[Held]) -> None:
        """One version from `batch`; on an error with no weight touched, from each half, until one job stands alone."""
        started = time.monotonic()
        try:
            update = self.step.run([held.prepared for held in batch])
        except (Torn, Unavailable):
            raise
        except Exception as error:
            if len(batch) == 1:
                self.intake.reject(batch[0], told(error), permanent=False)
                self.suspect(batch[0], error)
                return
            self.tell("on_split", len(batch), told(error).splitlines()[-1][:200])
            self.train(batch[: len(batch) // 2])
            self.train(batch[len(batch) // 2 :])
            return
        self.settle(batch, update, started)

    def suspect(self, held: Held, error: Exception) -> None:
        """The step broke on `held` alone. When it does so on one transcript after the other with nothing trained in
        between, it is not the transcripts: a dead GPU would fail the whole queue."""
        if isinstance(error, TandemError) or held.id in self.broken_on:
            return
        self.broken_on.append(held.id)
        if len(self.broken_on) == SICK_AFTER:
            raise Unavailable(
                f"training broke on {SICK_AFTER} transcripts in a row, each alone ({type(error).__name__}): the trainer"
                " is sick rather than they (a GPU error, say). Every other job was put back. Look at the errors of"
                f" {', '.join(self.broken_on)} in tandem dashboard, then start the worker again"
            ) from error

    def settle(self, batch: list[Held], update: Update, started: float) -> None:
        """Commit the version with the jobs it holds, then fail those the step refused."""
        if sorted([*update.results, *update.rejected]) != sorted(held.id for held in batch):
            raise TandemError("the step did not answer for exactly the jobs it was given; nothing was committed")
        if update.version is not None:
            trained = [held for held in batch if held.id in update.results]
            update.manifest.setdefault("step_s", time.monotonic() - started)
            update.manifest["linger_s"] = self.linger_s
            update.manifest["tokenize_s"] = sum(held.prepare_s for held in trained)
            moved, weights = (update.manifest.get(name) for name in ("update_rms", "weight_rms"))
            if moved is not None and weights:
                update.manifest["update_ratio"] = moved / weights
            commit_s = self.commit(trained, update)
            self.versions += 1
            self.broken_on.clear()
            line = {"version": update.version, "lineage": update.lineage, "jobs": len(trained), "commit_s": commit_s}
            self.tell("on_version", update.manifest | line)
        for held in batch:
            if held.id in update.rejected:
                self.intake.reject(held, update.rejected[held.id], permanent=True)

    def commit(self, trained: list[Held], update: Update) -> float:
        """Tell Redis, however long it takes: no batch may follow before. Returns the seconds it took."""

        def settle(pipe: Pipeline) -> None:
            first = len(pipe.command_stack)
            for held in trained:
                transitions.finish(self.queue, held.job, held.execution, update.results[held.id], pipe)
            merge(pipe, first)
            transitions.count_finished(self, len(trained), update.manifest["step_s"], pipe)

        record, started, asked, wait = update.record(), time.monotonic(), 0.0, 0.1
        while True:
            try:
                with self.settling:
                    ledger.commit(self.connection, record, settle, [held.job.dependents_key for held in trained])
                    self.intake.release(trained)
                point("committed")
                break
            except redis.DataError:
                raise  # the record cannot be written at all: ours to mend, not Redis'
            except redis.RedisError as error:
                if wait == 0.1:
                    self.tell(
                        "on_notice", f"Redis has not taken version {update.version} ({own_words(error)}); trying on"
                    )
                if self._stop_requested:
                    asked = asked or time.monotonic()
                    if time.monotonic() - asked > STOP_GRACE:
                        raise CommitPending(
                            f"stopped before Redis could be told of version {update.version}, which is in the weights;"
                            " start the worker again once Redis is back, and it will be committed"
                        ) from error
                time.sleep(wait)
                wait = min(wait * 2, 2.0)
        seconds = time.monotonic() - started
        try:
            said = transitions.after_commit(self, self.queue, trained, {"commit_s": seconds, "worker": self.name})
        except redis.RedisError as error:  # the version counts all the same; if Redis is away, the next call will wait
            said = [f"what waits for the jobs of version {update.version} was not released ({own_words(error)})"]
        for sentence in said:
            self.tell("on_notice", sentence)
        return seconds

    def resync(self, error: Exception) -> None:
        """Redis went away between steps. Wait for it, then start from what it knows: our jobs go back to its queue."""
        self.tell("on_notice", f"Redis does not serve us ({own_words(error)}); waiting until it does")
        started, wait = time.monotonic(), 0.1
        while not self._stop_requested:
            time.sleep(wait)
            wait = min(wait * 2, 2.0)
            try:
                self.connection.ping()
                self.lock.renew()
                count = len(self.intake.hands)
                self.put_back_rest()
                count += transitions.put_back_taken(self.queue)
            except redis.RedisError:
                continue
            seconds = time.monotonic() - started
            self.tell("on_notice", f"Redis serves us again after {seconds:.1f} s; {count} jobs put back")
            return

    def put_back_rest(self) -> None:
        """Return every job in hand to the front of the queue, in order, with no retry spent."""
        with self.settling:
            if rest := self.intake.hands:
                transitions.put_back(self, self.queue, rest)
                self.intake.release(rest)

    def leave(self) -> None:
        """The way out. A batch still in hand here was cut off by an error: it stays started, for the next worker."""
        self.pulse.stop()
        self._restore_signal_handlers()
        self.unsubscribe()
        for last in (self.put_back_backlog, lambda: self.tell("on_stop"), self.teardown, self.lock.release):
            try:
                last()
            except redis.RedisError as error:
                said = f"Redis could not be told that this worker ends ({own_words(error)}); the next one tidies up"
                self.tell("on_notice", said)

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
        """An error in RQ's thread that listens for commands. That Redis is away, the main thread says."""
        if isinstance(exc, redis.ConnectionError) or self._unsubscribed.is_set():
            self._unsubscribed.wait(2.0)
            return
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def put_back_backlog(self) -> None:
        with self.settling:
            if self.lock.held and self.intake.backlog:
                transitions.put_back(self, self.queue, list(self.intake.backlog))

    def beat(self) -> None:
        """One sign of life, from the heartbeat's thread: worker, jobs in hand, and the lock."""
        self.lock.renew()  # first: nothing that is wrong with a job may cost us the lock
        with self.settling:
            transitions.heartbeat(self, self.intake.hands, WORKER_TTL + 60)

    def request_stop(self, signum: int, frame: Any) -> None:
        """SIGTERM and SIGINT: finish the batch in hand, then end. Asking again changes nothing: a step that is cut
        short would tear the weights."""
        again = " (a step is never cut short)" if self._stop_requested else ""
        self._stop_requested = self.intake.stop = True
        self.tell("on_notice", f"{signal.Signals(signum).name}: finishing the batch in hand, then ending{again}")

    def _install_signal_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            super()._install_signal_handlers()

    def _restore_signal_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def tell(self, event: str, *details: Any) -> None:
        """Call a hook on every listener; one that raises must not stop the worker."""
        for hook in self.hooks:
            try:
                getattr(hook, event)(*details)
            except Exception:
                logger.exception("hook %s of %s raised", event, type(hook).__name__)
