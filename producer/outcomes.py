"""What a producer answers: what became of a transcript that was handed in, and where one is now.

Must not know: Redis.
Invariants: plain values, compared by value; nothing here holds a text of a transcript.
"""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .errors import TandemError, TranscriptFailedError

if TYPE_CHECKING:
    from rq.job import Job

_T = TypeVar("_T")


class Outcome(StrEnum):
    """What became of one transcript that was handed in."""

    QUEUED = "queued"
    """By this very call."""
    KNOWN = "known"
    """Its id was queued before, and is in no version yet. It is not queued again."""
    TRAINED = "trained"
    """Its id is in a version already. It is not queued again."""
    REFUSED = "refused"
    """It is not a valid transcript; `field` and `problem` say why."""
    REPLACED = "replaced"
    """Feedback on this answer was queued before, and is queued in its new form instead: by the same user, or ratings of
    several users as one."""
    WITHDRAWN = "withdrawn"
    """Ratings of this answer cancel out, or were taken back: nothing of them is queued. Later ones count with them."""


class State(StrEnum):
    """Where a transcript is: RQ's words, and two of our own, LOST and UNKNOWN."""

    QUEUED = "queued"
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    DEFERRED = "deferred"
    SCHEDULED = "scheduled"
    CANCELED = "canceled"
    STOPPED = "stopped"
    LOST = "lost"
    """It was queued, and Redis has lost its job: evicted, or deleted. It is in no version; hand it in again."""
    UNKNOWN = "unknown"
    """Neither the queue nor the ledger knows the id."""
    OTHER = "other"
    """A word of an RQ that we do not know, or that no RQ wrote."""

    @classmethod
    def of(cls, word: str) -> "State":
        """The state of a job whose hash says `word`."""
        rq_words = {state.value: state for state in cls if state not in (cls.LOST, cls.UNKNOWN, cls.OTHER)}
        return rq_words.get(word, cls.OTHER)


@dataclass(frozen=True, slots=True)
class Status:
    """Where a transcript is. version: the version that contains it. reason: why it failed, one line."""

    id: str
    state: State
    version: int | None = None
    reason: str | None = None


class _Waits(Protocol):
    def wait(self, job_id: str, timeout: float | None = None) -> int: ...
    def job(self, job_id: str) -> "Job | None": ...


class _AsyncWaits(Protocol):
    def wait(self, job_id: str, timeout: float | None = None) -> Awaitable[int]: ...


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of one transcript that was handed in: the fields that `Enqueued` and `AsyncEnqueued` share.

    id: the transcript's and its job's; of a refused one, the id that it came with, or "".
    version: the version that contains it, where it is trained. field, problem: of a refused one, where and why.
    """

    id: str
    outcome: Outcome
    version: int | None = None
    field: str | None = None
    problem: str | None = None

    @property
    def new(self) -> bool:
        """Whether it was queued by this very call."""
        return self.outcome is Outcome.QUEUED

    @property
    def refused(self) -> bool:
        """Whether it is not a valid transcript."""
        return self.outcome is Outcome.REFUSED

    def _must_be_queued(self) -> None:
        if self.refused:
            raise TranscriptFailedError(f"the transcript was refused: {self.field}: {self.problem}")
        if self.outcome is Outcome.WITHDRAWN:
            raise TranscriptFailedError("the ratings of this answer cancel out: nothing is queued to wait for")


@dataclass(frozen=True, slots=True)
class Enqueued(Sent):
    """What a `Producer` answers."""

    _producer: _Waits | None = field(default=None, repr=False, compare=False)

    def wait(self, timeout: float | None = None) -> int:
        """The version that contains it; see `Producer.wait`. Raises TranscriptFailedError at once if it was refused."""
        self._must_be_queued()
        if self.version is not None:
            return self.version
        return _there(self._producer).wait(self.id, timeout)

    @property
    def job(self) -> "Job | None":
        """The RQ job, in one round trip; None once it has expired, and for a refused transcript."""
        return None if self.refused else _there(self._producer).job(self.id)


@dataclass(frozen=True, slots=True)
class AsyncEnqueued(Sent):
    """What an `AsyncProducer` answers."""

    _producer: _AsyncWaits | None = field(default=None, repr=False, compare=False)

    async def wait(self, timeout: float | None = None) -> int:
        """See `Enqueued.wait`."""
        self._must_be_queued()
        if self.version is not None:
            return self.version
        return await _there(self._producer).wait(self.id, timeout)

    @property
    def job(self) -> Any:
        """Not offered here."""
        raise TandemError("an AsyncProducer's result has no RQ job, which would block: use status() or wait()")


def _there(producer: "_T | None") -> "_T":
    if producer is None:
        raise TandemError("this result was made by hand: ask a Producer for the status of its id")
    return producer
