"""One version from a batch; when the step breaks with no weight touched, from each half, until the one job at fault
stands alone.

Must not know: torch.
Invariants: torn weights, a server that is gone and a Redis that is away are never blamed on a transcript; a trainer
that breaks on everything does not empty the queue.
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from producer.errors import TandemError
from worker.config.protocol import Step, TornWeightsError, UnavailableError
from worker.consumer.batcher import Batcher
from worker.consumer.commit import Committer
from worker.consumer.error_text import told
from worker.consumer.transitions import JobInHand

SICK_AFTER = 3
"""Transcripts on which a step may break one after the other, each alone, before it is the step that is to blame."""


class Bisection:
    """Trains batches of `batcher` with `step` and has them committed. tell: the worker's hooks."""

    def __init__(self, step: Step[Any], batcher: Batcher, committer: Committer, tell: Callable[..., None]) -> None:
        self.step, self.batcher, self.committer, self.tell = step, batcher, committer, tell
        self.broken_on: list[str] = []
        """Jobs on which the step broke alone, since a version was trained."""

    def train(self, batch: list[JobInHand], linger_s: float) -> None:
        """One version from `batch`, or several. linger_s: how long it took to collect, for the manifest."""
        started = time.monotonic()
        try:
            update = self.step.run([held.prepared for held in batch])
        except (TornWeightsError, UnavailableError, redis.RedisError):
            raise
        except Exception as error:
            if len(batch) == 1:
                self.batcher.reject(batch[0], told(error), permanent=False)
                self._suspect(batch[0], error)
                return
            self.tell("on_split", len(batch), told(error).splitlines()[-1][:200])
            self.train(batch[: len(batch) // 2], linger_s)
            self.train(batch[len(batch) // 2 :], linger_s)
            return
        self.committer.settle(batch, update, step_s=time.monotonic() - started, linger_s=linger_s)
        if update.version is not None:
            self.broken_on.clear()

    def _suspect(self, held: JobInHand, error: Exception) -> None:
        """The step broke on `held` alone. When it does so on one transcript after the other with nothing trained in
        between, it is not the transcripts: a dead GPU would fail the whole queue."""
        if isinstance(error, TandemError) or held.id in self.broken_on:
            return
        self.broken_on.append(held.id)
        if len(self.broken_on) == SICK_AFTER:
            raise UnavailableError(
                f"training broke on {SICK_AFTER} transcripts in a row, each alone ({type(error).__name__}): the trainer"
                " is failing, not the transcripts (a GPU error, say). Every other job was put back. Look at the errors"
                f" of {', '.join(self.broken_on)} in tandem dashboard, then start the worker again"
            ) from error
