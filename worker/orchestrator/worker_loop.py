"""The worker's loop: the queue is drained into versions, and between two of them comes whatever must not meet a write.

Between two batches, in this order: is the server there; the canary; a paused training; a checkpoint; on a CPU, freed
memory is given back; the rest until what the last versions took from serving is paid.
Invariants: nothing but this loop's thread writes weights; whatever goes wrong after a first write ends the worker.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import redis

from worker.checkpoint.batch_codec import rename
from worker.config.guard_options import GuardSettings
from worker.config.protocol import UnavailableError
from worker.consumer.batch_worker import BatchWorker
from worker.consumer.events import Hooks
from worker.consumer.redis_errors import own_words
from worker.consumer.worker_lock import WorkerLock
from worker.data.examples import Example
from worker.data.replay_buffer import ReplayBuffer
from worker.orchestrator.agreement import RedisBehindError, agree, confirm
from worker.orchestrator.canary import Canary, CanaryStep, load
from worker.orchestrator.dislikes import DislikeGuard
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.lone import Lone
from worker.orchestrator.reference_set import reference_examples
from worker.orchestrator.reports import Tell, log_report
from worker.orchestrator.rollback import roll_back
from worker.orchestrator.session import Session
from worker.trainer.outliers import Guards
from worker.trainer.teachers import Teachers
from worker.trainer.threads import TrainingThreads
from worker.utils.heap import HeapTrim
from worker.versions import ledger, pause_switch, replica_status, share_status

log = logging.getLogger("tandem")


class WorkerLoop:
    """Of one session, whose weights agree with Redis and the state directory; `lock` is held.

    until_empty: stop when the queue is empty. threads: of the CPU; None: as torch has them. hooks, limits:
    `BatchWorker`'s. tell: is given what was done besides. fleet: the other replicas; none by default.
    """

    def __init__(
        self,
        connection: redis.Redis,
        session: Session,
        lock: WorkerLock,
        guards: GuardSettings,
        threads: TrainingThreads | None = None,
        *,
        until_empty: bool,
        hooks: Sequence[Hooks],
        tell: Tell = log_report,
        fleet: Lone | None = None,
        **limits: Any,
    ) -> None:
        self.connection, self.session, self.lock = connection, session, lock
        self.until_empty, self.hooks, self.limits = until_empty, hooks, limits
        self.tell, self.fleet = tell, fleet or Lone()
        rehearsal = ReplayBuffer(guards.rehearse, rename, seed=session.h.seed) if guards.rehearse else None
        self.update = LiveUpdate(
            session,
            guards=Guards(guards.outliers, words=session.trainer.head.words),
            dislikes=_dislike_guard(guards, session),
            rehearsal=rehearsal,
            threads=threads,
            confirm=partial(confirm, connection, session),
            fleet=self.fleet,
        )
        canary = Canary.of(guards, session.builder, self._score)
        going_back = self._all_go_back if guards.auto_rollback else None
        self.canary = CanaryStep(canary, connection, going_back, tell) if canary is not None else None
        self.heap = HeapTrim() if session.trainer.device.type == "cpu" else None
        self.told, self.told_members = 0.0, ""
        share_status.start(connection, self.update.cost.budget)

    def run(self) -> None:
        """Work until told to stop. A Redis that comes back with less than the weights have is mended in between, once a
        version."""
        mended = -1
        while True:
            worker = self._worker()
            try:
                worker.work(burst=self.until_empty)
                self.fleet.end()
                return
            except (ledger.LedgerMismatchError, RedisBehindError) as error:
                if (version := self.session.weights.header.version) == mended:
                    raise
                mended = version
                log.warning("%s; it gets them from the journal", error)
                if said := self.lock.acquire():
                    log.info(said)
                agree(self.connection, self.session, tell=self.tell)

    def _worker(self) -> BatchWorker:
        worker = BatchWorker(
            self.connection,
            self.update,
            hooks=self.hooks,
            lock=self.lock,
            check=lambda: self.between_batches(worker),
            short_tokens=self.session.trainer.room.by_factors,
            **self.limits,
        )
        self.fleet.heed(lambda: bool(worker.stop_requested))
        return worker

    def between_batches(self, worker: BatchWorker) -> None:
        """Raises `UnavailableError` when the server has gone, `TornWeightsError` when a rollback broke off."""
        cost = self.update.cost
        cost.look()
        self._see_others()
        if self.canary is not None:
            self.canary.take(self.session.weights.header.version)
        pause_switch.wait(
            self.connection,
            burst=self.until_empty,
            stopping=lambda: worker.stop_requested,
            tell=log.warning,
            look=self._see_others,
        )
        if self.session.manager.checkpoints.is_due():
            self.fleet.checkpoint()
        if report := self.session.manager.checkpoints.write_if_due():
            self.tell(report)

        def stopping() -> bool:
            nothing_left = self.until_empty and not worker.batcher.hands and not worker.queue.count
            return worker.stop_requested or nothing_left

        if cost.budget.total != self.told:
            share_status.tell(self.connection, cost.budget)
            self.told = cost.budget.total
        if self.heap is not None:
            self.heap.look()
        share_status.rest(self.connection, cost.budget, stopping=stopping, look=cost.look)

    def _see_others(self) -> None:
        """Which replicas are there, and who comes back: also while training is paused, since a torn server waits for
        it. Redis is told."""
        self.fleet.look()
        if (members := self.fleet.members.plain()) != self.told_members:
            replica_status.tell(self.connection, self.fleet.members)
            self.told_members = members

    def _score(self, examples: Sequence[Example]) -> dict[str, float]:
        with self.update.cost.computing():
            return self.session.trainer.score(examples)  # whichever is the trainer then

    def _all_go_back(self, version: int) -> int:
        """As `_go_back`, and the other replicas with us."""
        try:
            return self._go_back(version)
        finally:
            self.fleet.changed()

    def _go_back(self, version: int) -> int:
        """`version` again, live and committed; the version that it is now."""
        try:
            for report in roll_back(self.connection, self.session, version, reason="the canary set's loss"):
                self.tell(report)
        except redis.RedisError:
            self.update.remember()
            try:  # waits for Redis; `RedisBehindError` has `run` commit from the journal
                confirm(self.connection, self.session)
            except redis.RedisError as away:
                raise UnavailableError(
                    f"the weights were rolled back to version {version}, and Redis, which has not heard of it, does not"
                    f" answer ({own_words(away)}): start the worker again, which tells it"
                ) from away
            raise
        self.update.remember()
        return self.session.weights.header.version


def _dislike_guard(settings: GuardSettings, session: Session) -> DislikeGuard[Teachers] | None:
    """The one that the flags ask for: on the canary sets, or where there is none, on conversations of ours."""
    if not settings.dislikes_bound:
        return None
    builder = session.builder
    sets = [load(file, builder, name) for name, file in settings.canary]
    examples = [example for one in sets for example in one] or reference_examples(builder)
    return DislikeGuard(examples, lambda: session.trainer, settings.dislikes_bound)
