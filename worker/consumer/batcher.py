"""Which jobs make the next batch.

Must not know: torch.
Invariants: every job taken is acknowledged, dropped, failed alone, or in `backlog` or `batch`, each id once and in the
order it came; texts never reach logs; the only time limit, SIGALRM, is around preparing one transcript.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import redis

from producer.errors import TandemError
from worker.config.protocol import JobResult, Step, TornWeightsError, UnavailableError
from worker.consumer import settlement, transitions
from worker.consumer.error_text import told
from worker.consumer.events import IdDropped, ResultNotWritten
from worker.consumer.jobs import FeedbackQueue
from worker.consumer.rq_private import RqWorker
from worker.consumer.time_limit import TimeLimitExceeded, time_limit
from worker.consumer.transitions import JobInHand
from worker.versions import lost_jobs

IDLE_POLL = 1.0
"""Seconds a wait for the first job may last before signals, retries and maintenance are looked at."""

FEW = 3
"""A batch ends short while so many times its own jobs, or fewer, wait: more are cheaper by the token in a long one."""
LOOKS, QUIET = 8, 2
"""How often the queue is looked at while a batch lingers, and after how many looks in a row that found nothing the
batch goes. A look takes two round trips to Redis."""


class Batcher:
    """Collects batches for `worker`: at most `max_jobs`, at most `max_tokens` (a larger transcript goes alone), at most
    `linger` seconds after the first job. A batch goes as soon as nothing new came for a quarter of that.

    short_tokens: tokens of a batch that the server is paused for least, where longer ones take another way (0: all are
    alike). While few jobs wait, a batch ends before it would be longer; what is left over comes next.
    tell: the worker's hooks. settling: held while jobs change hands, so that no heartbeat falls between.
    """

    def __init__(
        self,
        worker: RqWorker,
        queue: FeedbackQueue,
        step: Step[Any],
        *,
        max_jobs: int,
        max_tokens: int,
        linger: float,
        prepare_limit: int,
        tell: Callable[..., None],
        settling: threading.RLock,
        short_tokens: int = 0,
    ) -> None:
        if max_jobs < 1 or max_tokens < 1 or linger < 0 or prepare_limit < 1:
            raise TandemError("max_jobs, max_tokens and prepare_limit must be at least 1, linger at least 0")
        self.worker, self.queue, self.step = worker, queue, step
        self.max_jobs, self.max_tokens, self.linger, self.prepare_limit = max_jobs, max_tokens, linger, prepare_limit
        self.short_tokens = short_tokens
        self.tell, self.settling = tell, settling
        self.stop = False
        """Set to end lingering: the batch in hand is the last."""
        self.backlog: deque[JobInHand] = deque()
        """Begun and not chosen yet: what did not fit a batch waits here for the next."""
        self.batch: list[JobInHand] = []
        """Chosen for the batch that is being collected or trained. Whoever settles a job removes it."""
        self.first = 0.0
        """time.monotonic() of the batch's first job."""

    @property
    def hands(self) -> list[JobInHand]:
        """All jobs that are ours to settle or put back, oldest first."""
        return [*self.batch, *self.backlog]

    def collect(self, burst: bool = False) -> bool:
        """Fill `batch`, prepared, until it is full or time is up; False when nothing came within a second.

        burst: do not wait for jobs that are not there yet.
        """
        tokens = quiet = 0
        while True:
            while self.backlog and len(self.batch) < self.max_jobs:
                held = self.backlog[0]
                if not self.admit(held):
                    continue
                apart = held.alone or (self.batch and self.batch[0].alone)
                longer = tokens + held.prepared.tokens
                if self.batch and (apart or longer > self.max_tokens or self.ends_short(tokens, longer)):
                    return True
                if not self.batch:
                    self.first = time.monotonic()
                self.batch.append(self.backlog.popleft())
                tokens += held.prepared.tokens
            left = self.first + self.linger - time.monotonic() if self.batch else IDLE_POLL
            over = left <= 0 or quiet >= QUIET or self.stop
            if over or len(self.batch) >= self.max_jobs or tokens >= self.max_tokens:
                return bool(self.batch)
            if self.batch and not burst:
                # Redis ends a blocking read up to 100 ms late: to linger exactly, look again a few times.
                time.sleep(min(left, self.linger / LOOKS))
            came = self.fetch(self.max_jobs - len(self.batch), 0.0 if burst or self.batch else IDLE_POLL)
            quiet = quiet + 1 if self.batch and not came else 0
            if not came and (burst or not self.batch):
                return bool(self.batch)

    def ends_short(self, tokens: int, longer: int) -> bool:
        """Whether a batch of `tokens` goes as it is, because of `longer` tokens the server would be paused longer."""
        return tokens <= self.short_tokens < longer and len(self.backlog) <= FEW * len(self.batch)

    def fetch(self, count: int, wait: float) -> int:
        """Take up to `count` jobs, acknowledge those already trained, begin the others; returns how many ids came."""
        taken, dropped = transitions.take(self.queue, count, wait)
        for gone in dropped:
            self.tell("on_notice", IdDropped(repr(gone.raw_id[:40]), gone.why))
        lost_jobs.record(self.queue.connection, [gone.lost for gone in dropped if gone.lost])
        if not taken and not dropped:
            # All that was taken has begun, so what is in between was taken by a reply that got lost.
            return transitions.put_back_taken(self.queue)
        mine = {held.id for held in self.hands}
        fresh: list[JobInHand] = []
        for held in taken:
            if held.version is not None:
                self.acknowledge(held)
            elif held.id in mine or held.canceled:
                transitions.forget(self.queue, held)
            else:
                mine.add(held.id)
                fresh.append(held)
        if fresh:
            with self.settling:
                self.backlog.extend(fresh)  # before they begin: whatever happens now, they are ours to put back
                broken = transitions.begin(self.worker, self.queue, fresh)
            for held in [held for held in fresh if held.id in broken]:
                reason = f"Redis key {broken[held.id]} is of a wrong type: delete it, then requeue the job"
                self.reject(held, reason, permanent=True)
        return len(taken) + len(dropped)

    def acknowledge(self, held: JobInHand) -> None:
        """A transcript the ledger knows: finished, with the version it went into, and not trained again."""
        assert held.version is not None
        result = JobResult(held.version, already_trained=True)
        if broken := settlement.acknowledge(self.queue, held, result.as_map()):
            self.tell("on_notice", ResultNotWritten(held.id, broken))
        self.tell("on_already_trained", held.id, held.version)

    def admit(self, held: JobInHand) -> bool:
        """Validate and prepare the first job of the backlog, once; one that cannot be trained is failed here, alone."""
        if held.prepared is not None:
            return True
        started = time.monotonic()
        try:
            with time_limit(self.prepare_limit):
                held.prepared = self.step.prepare(held.id, held.job.transcript())
            held.prepare_s = time.monotonic() - started
            return True
        except (TornWeightsError, UnavailableError, redis.RedisError):
            raise
        except TimeLimitExceeded:
            self.reject(held, f"preparing the transcript took more than {self.prepare_limit} s", permanent=True)
        except TandemError as error:
            self.reject(held, told(error), permanent=True)
        except Exception as error:
            self.reject(held, told(error), permanent=False)
        return False

    def reject(self, held: JobInHand, reason: str, *, permanent: bool) -> None:
        """Fail one job through RQ (which retries it if it may be), let go of it, and say so."""
        with self.settling:
            settlement.fail(self.worker, self.queue, held, reason, permanent=permanent)
            self.release([held])
        self.tell("on_rejected", held.id, reason)

    def release(self, settled: list[JobInHand]) -> None:
        """These jobs are settled: no longer ours."""
        gone = {held.id for held in settled}
        self.batch = [held for held in self.batch if held.id not in gone]
        self.backlog = deque(held for held in self.backlog if held.id not in gone)
