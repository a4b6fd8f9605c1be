"""How a trained batch becomes a version that Redis knows: one EXEC, repeated until its outcome is known.

Must not know: torch.
Invariants: a version that the weights have is told to Redis before anything else is trained; a record is committed
once, whatever becomes of answers; a job is no longer in hand only after Redis has said so.
"""

import threading
import time
from collections.abc import Callable

import redis
from redis.client import Pipeline

from producer.errors import TandemError
from worker.config.protocol import Update
from worker.consumer import rq_private, settlement
from worker.consumer.batcher import Batcher
from worker.consumer.events import CommitWaits, NotesNotWritten
from worker.consumer.jobs import FeedbackQueue
from worker.consumer.redis_errors import own_words
from worker.consumer.rq_private import RqWorker
from worker.consumer.transitions import JobInHand
from worker.utils.fault_injection import point
from worker.versions import ledger

STOP_GRACE = 15.0
"""Seconds a stopping worker goes on trying to tell Redis of a version."""


class CommitPendingError(TandemError):
    """The worker had to stop with a version in the weights that Redis does not know yet."""


class Committer:
    """Settles what a step did with a batch.

    settling: held while jobs change hands. tell: the worker's hooks. history: see `ledger.commit`.
    """

    def __init__(
        self,
        worker: RqWorker,
        queue: FeedbackQueue,
        batcher: Batcher,
        settling: threading.RLock,
        tell: Callable[..., None],
        history: int | None = None,
    ) -> None:
        self.history = history
        self.worker, self.queue, self.batcher, self.settling, self.tell = worker, queue, batcher, settling, tell
        self.versions = 0
        """How many versions were committed."""

    def settle(self, batch: list[JobInHand], update: Update, *, step_s: float, linger_s: float) -> None:
        """Commit the version with the jobs it holds, then fail those the step refused. step_s, linger_s: seconds."""
        if sorted([*update.results, *update.rejected]) != sorted(held.id for held in batch):
            raise TandemError("the step did not answer for exactly the jobs it was given; nothing was committed")
        if update.version is not None:
            trained = [held for held in batch if held.id in update.results]
            self._complete(update, trained, step_s, linger_s)
            commit_s = self._commit(trained, update)
            self.versions += 1
            line = {"version": update.version, "lineage": update.lineage, "jobs": len(trained), "commit_s": commit_s}
            self.tell("on_version", update.manifest | line)
        for held in batch:
            if held.id in update.rejected:
                self.batcher.reject(held, update.rejected[held.id], permanent=True)

    @staticmethod
    def _complete(update: Update, trained: list[JobInHand], step_s: float, linger_s: float) -> None:
        """What only the queue's side knows of a version, and what follows from its measurements."""
        update.manifest.setdefault("step_s", step_s)
        update.manifest["linger_s"] = linger_s
        update.manifest["tokenize_s"] = sum(held.prepare_s for held in trained)
        moved, weights = (update.manifest.get(name) for name in ("update_rms", "weight_rms"))
        if moved is not None and weights:
            update.manifest["update_ratio"] = moved / weights

    def _commit(self, trained: list[JobInHand], update: Update) -> float:
        """Tell Redis, however long it takes: no batch may follow before. Returns the seconds it took."""

        def finish(pipe: Pipeline) -> None:
            settlement.finish(self.queue, trained, update.result_maps(), pipe)
            rq_private.count_finished(self.worker, len(trained), update.manifest["step_s"], pipe)

        record, started, asked, wait = update.record(), time.monotonic(), 0.0, 0.1
        assert update.version is not None
        while True:
            try:
                with self.settling:
                    ledger.commit(self.worker.connection, record, finish, history=self.history)
                    self.batcher.release(trained)
                point("committed")
                break
            except redis.DataError:
                raise  # the record cannot be written at all: ours to mend, not Redis'
            except redis.RedisError as error:
                if wait == 0.1:
                    self.tell("on_notice", CommitWaits(update.version, own_words(error)))
                if self.worker.stop_requested:
                    asked = asked or time.monotonic()
                    if time.monotonic() - asked > STOP_GRACE:
                        raise CommitPendingError(
                            f"stopped before Redis could be told of version {update.version}, which is in the weights;"
                            " start the worker again once Redis is back, and it will be committed"
                        ) from error
                time.sleep(wait)
                wait = min(wait * 2, 2.0)
        seconds = time.monotonic() - started
        try:
            settlement.after_commit(self.worker, trained, {"commit_s": seconds, "worker": self.worker.name})
        except redis.RedisError as error:  # the version counts all the same; if Redis is away, the next call will wait
            self.tell("on_notice", NotesNotWritten(update.version, own_words(error)))
        return seconds
