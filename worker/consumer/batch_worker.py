"""The loop of the queue's worker: it collects a batch, has it trained, and starts again from Redis when Redis was away.

What a step that breaks leads to is bisection.py's, how a version is committed commit.py's.
Must not know: torch, vLLM.
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

from worker.config.protocol import Step, UnavailableError
from worker.consumer import transitions, upkeep
from worker.consumer.batcher import Batcher
from worker.consumer.bisection import Bisection
from worker.consumer.commit import Committer
from worker.consumer.events import (
    EndNotTold,
    Hooks,
    JobsRecovered,
    MayEvict,
    RedisAway,
    RedisBack,
    Stopping,
    TookOver,
)
from worker.consumer.heartbeat import Heartbeat
from worker.consumer.jobs import FeedbackJob, FeedbackQueue, open_queue
from worker.consumer.log_lines import LogHooks, logger
from worker.consumer.redis_errors import own_words, retryable
from worker.consumer.rq_private import RqWorker
from worker.consumer.transitions import JobInHand
from worker.consumer.worker_lock import WorkerLock
from worker.versions.eviction_watch import EvictionWatch

WORKER_TTL = 60
"""Seconds after which RQ's tools no longer list a silent worker."""


class BatchWorker(RqWorker):
    """An RQ worker of queue `feedback` that trains many jobs as one version.

    step: what trains. max_jobs, max_tokens, linger (seconds after the first job): whichever fills first ends a batch.
    short_tokens: see `Batcher`.
    prepare_limit: whole seconds of computing that preparing one transcript may take. heartbeat: seconds between signs
    of life.
    hooks: told of what happens. lock: the worker lock, when the caller took it already (to reconcile under it).
    check: called between batches, about once a second; raises `UnavailableError` when no step can run any more.
    history: how many versions back Redis keeps manifests; None: all.
    """

    job_class = FeedbackJob
    queue_class = FeedbackQueue

    def __init__(
        self,
        connection: redis.Redis,
        step: Step[Any],
        *,
        name: str | None = None,
        max_jobs: int = 32,
        max_tokens: int = 65536,
        linger: float = 1.0,
        short_tokens: int = 0,
        prepare_limit: int = 60,
        heartbeat: float = 10.0,
        hooks: Sequence[Hooks] | None = None,
        lock: WorkerLock | None = None,
        check: Callable[[], None] | None = None,
        history: int | None = None,
    ) -> None:
        self.queue = open_queue(connection)
        super().__init__(self.queue, connection, name, ttl=WORKER_TTL)
        self.step = step
        self.check = check
        self.hooks: list[Hooks] = list(hooks) if hooks is not None else [LogHooks()]
        self.lock = lock or WorkerLock(connection, self.name)
        self.settling = threading.RLock()
        limits: dict[str, Any] = {"max_jobs": max_jobs, "max_tokens": max_tokens, "linger": linger}
        limits["short_tokens"] = short_tokens
        self.batcher = Batcher(
            self, self.queue, step, prepare_limit=prepare_limit, tell=self.tell, settling=self.settling, **limits
        )
        self.committer = Committer(self, self.queue, self.batcher, self.settling, self.tell, history)
        self.heartbeats = Heartbeat(heartbeat, self.beat)
        self.evictions = EvictionWatch(connection, lambda problem: self.tell("on_notice", MayEvict(problem)))

    @property
    def versions(self) -> int:
        """How many versions this worker has trained."""
        return self.committer.versions

    def work(  # type: ignore[override]
        self, burst: bool = False, max_versions: int | None = None, logging_level: str = "WARNING", **_: Any
    ) -> int:
        """Drain until asked to stop (SIGTERM, SIGINT, RQ's shutdown command); burst: until the queue is empty.

        Returns how many versions were trained. Raises TandemError (WorkerBusyError, LockLostError, TornWeightsError,
        UnavailableError, LedgerMismatchError, CommitPendingError) when the worker must not go on, and RedisError only
        before it has begun.
        """
        self.take_lock()
        self.committer.versions = 0
        bisection = Bisection(self.step, self.batcher, self.committer, self.tell)
        try:
            self.begin(logging_level)
            while not self.stop_requested and (max_versions is None or self.versions < max_versions):
                try:
                    if not self.go_round(bisection, burst):
                        break
                except redis.RedisError as error:
                    if not retryable(error):
                        raise
                    self.resync(error)
            self.put_back_rest()
            return self.versions
        except UnavailableError:
            try:
                self.put_back_rest()
            except redis.RedisError as error:  # what ends the worker is the other error
                self.tell("on_notice", EndNotTold(own_words(error)))
            raise
        finally:
            self.leave()

    def take_lock(self) -> None:
        if self.lock.held:
            self.lock.renew()  # the caller may have taken minutes between taking it and this
        elif said := self.lock.acquire():
            self.tell("on_notice", TookOver(said))

    def begin(self, logging_level: str) -> None:
        """What a dead worker held goes back to the queue; then this one shows itself and beats."""
        transitions.announce(self.queue)
        recovered, wrong = upkeep.recover(self.queue, self.name)
        for notice in [*wrong, *([JobsRecovered(recovered)] if recovered else [])]:
            self.tell("on_notice", notice)
        self.begin_life(logging_level)
        self.heartbeats.start()
        self.tell("on_start")

    def go_round(self, bisection: Bisection, burst: bool) -> bool:
        """One round of the loop: upkeep, then a batch if there is one. False: burst mode has nothing left to do."""
        self.heartbeats.check()
        self.evictions.look()
        if self.check is not None:
            self.check()
        if self.is_suspended_in_burst(burst):
            return False
        upkeep.enqueue_due(self.queue)
        if self.maintenance_is_due():
            for notice in upkeep.clean(self.queue, {held.id for held in self.batcher.hands}):
                self.tell("on_notice", notice)
        if self.batcher.collect(burst):
            bisection.train(list(self.batcher.batch), linger_s=time.monotonic() - self.batcher.first)
            return True
        return not burst or bool(upkeep.enqueue_due(self.queue))

    def resync(self, error: Exception) -> None:
        """Redis went away between steps. Wait for it, then start from what it knows: our jobs go back to its queue."""
        self.tell("on_notice", RedisAway(own_words(error)))
        started, wait = time.monotonic(), 0.1
        while not self.stop_requested:
            time.sleep(wait)
            wait = min(wait * 2, 2.0)
            try:
                self.connection.ping()
                self.lock.renew()
                count = len(self.batcher.hands)
                self.put_back_rest()
                count += transitions.put_back_taken(self.queue)
            except redis.RedisError:
                continue
            self.tell("on_notice", RedisBack(time.monotonic() - started, count))
            return

    def put_back_rest(self) -> None:
        """Return every job in hand to the front of the queue, in order, with no retry spent."""
        self.put_back(self.batcher.hands)

    def put_back(self, jobs: list[JobInHand]) -> None:
        with self.settling:
            if jobs:
                transitions.put_back(self, self.queue, jobs)
                self.batcher.release(jobs)

    def leave(self) -> None:
        """The way out. A batch still in hand here was cut off by an error: it stays started, for the next worker."""
        self.heartbeats.stop()
        self.give_back_signals()
        self.unsubscribe()
        for last in (self.put_back_backlog, lambda: self.tell("on_stop"), self.teardown, self.lock.release):
            try:
                last()
            except redis.RedisError as error:
                self.tell("on_notice", EndNotTold(own_words(error)))

    def put_back_backlog(self) -> None:
        if self.lock.held:
            self.put_back(list(self.batcher.backlog))

    def beat(self) -> None:
        """One sign of life, from the heartbeat's thread: worker, jobs in hand, and the lock."""
        self.lock.renew()  # first: nothing that is wrong with a job may cost us the lock
        with self.settling:
            transitions.heartbeat(self, self.batcher.hands, WORKER_TTL + 60)

    def request_stop(self, signum: int, frame: Any) -> None:
        """SIGTERM and SIGINT: finish the batch in hand, then end. Asking again changes nothing: a step that is cut
        short would tear the weights."""
        notice = Stopping(signal.Signals(signum).name, again=self.stop_requested)
        self.stop_requested = self.batcher.stop = True
        self.tell("on_notice", notice)

    def tell(self, event: str, *details: Any) -> None:
        """Call a hook on every listener; one that raises must not stop the worker."""
        for hook in self.hooks:
            try:
                getattr(hook, event)(*details)
            except Exception:
                logger.exception("hook %s of %s raised", event, type(hook).__name__)
