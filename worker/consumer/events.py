"""What a worker tells of itself: hooks that do nothing. They get data; log_lines.py makes English of it.

Must not know: Redis, RQ, torch.
Invariants: a hook sees ids, numbers and reasons, never a transcript's text; a hook that raises is logged and ignored.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Notice:
    """Something that a person who watches would want to know."""


@dataclass(frozen=True)
class TookOver(Notice):
    """The worker lock was a dead worker's. said: whose."""

    said: str


@dataclass(frozen=True)
class JobsRecovered(Notice):
    """A dead worker's jobs were put back."""

    jobs: int


@dataclass(frozen=True)
class IdDropped(Notice):
    """An id in the queue belongs to no job. id: as Python writes it, cut to 40 characters."""

    id: str
    why: str


@dataclass(frozen=True)
class EntryDropped(Notice):
    """An entry of RQ's registry of started jobs belongs to no job."""

    entry: str


@dataclass(frozen=True)
class ResultNotWritten(Notice):
    """A job that was trained before could not be given its result. key: what is of a wrong type."""

    job_id: str
    key: str


@dataclass(frozen=True)
class CommitWaits(Notice):
    """Redis does not take a version that the weights have; it is tried until it does. problem: Redis' words."""

    version: int
    problem: str


@dataclass(frozen=True)
class NotesNotWritten(Notice):
    """A version is committed, but `weights:state` could not be told how long that took."""

    version: int
    problem: str


@dataclass(frozen=True)
class RedisAway(Notice):
    """Redis does not serve the worker, which waits. problem: Redis' words."""

    problem: str


@dataclass(frozen=True)
class RedisBack(Notice):
    """Redis serves the worker again. jobs: how many were put back."""

    seconds: float
    jobs: int


@dataclass(frozen=True)
class MayEvict(Notice):
    """Redis may evict what is queued. problem: how, and what to do."""

    problem: str


@dataclass(frozen=True)
class Stopping(Notice):
    """A signal came. again: it is not the first."""

    signal: str
    again: bool


@dataclass(frozen=True)
class EndNotTold(Notice):
    """Redis could not be told that this worker ends. problem: Redis' words."""

    problem: str


@dataclass(frozen=True)
class MaintenanceFailed(Notice):
    """RQ's maintenance broke off. kind: the exception's type."""

    kind: str


class Hooks:
    """Subclass and override what you need; every method does nothing. Called in the worker's main thread."""

    def on_start(self) -> None:
        """The worker holds its lock and is about to take jobs."""

    def on_version(self, line: dict[str, Any]) -> None:
        """A version is committed. line: version, lineage, jobs, tokens, loss, update_ratio (RMS of the update over RMS
        of the weights), linger_s, tokenize_s, step_s, pause_s, commit_s (seconds), as far as known."""

    def on_rejected(self, job_id: str, reason: str) -> None:
        """A job failed alone, or was sent back for a retry."""

    def on_already_trained(self, job_id: str, version: int) -> None:
        """A job was finished with the version its transcript went into earlier."""

    def on_split(self, jobs: int, error: str) -> None:
        """A batch of `jobs` failed with no weight touched and is tried again in halves."""

    def on_notice(self, notice: Notice) -> None:
        """Anything else: see the subclasses of `Notice`."""

    def on_stop(self) -> None:
        """The worker takes no more jobs."""
