"""What the queue's worker asks of the thing that trains: one protocol, one answer, two errors.

Must not know: Redis, RQ, torch. Everything here is plain Python, so that the queue side can be tested with any step
and the training side with any queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.config.version_record import VersionRecord


class TornWeightsError(TandemError):
    """The weights can no longer be trusted: a write began and did not end. The worker exits; nothing is committed."""


class UnavailableError(TandemError):
    """No step can run now, whatever the transcripts (the server is gone, say), and no weight was touched.

    The worker puts every job back where it came from, with no retry spent, and exits with this message.
    """


class Prepared(Protocol):
    """A transcript ready to train; `worker.data.examples.Example` is one."""

    @property
    def id(self) -> str:
        """The job's id."""

    @property
    def tokens(self) -> int:
        """All its tokens, trained or not: what the batch's token limit counts."""


@dataclass(frozen=True)
class JobResult:
    """What became of one trained transcript: its job's result in RQ, and kept with the version's record.

    version: the version that contains it. loss: its mean NLL per trained token before the update, if known; of a
    correction, the chosen answer's. report: plain counts of its example (turns, tokens, ...), and its kind where it is
    no demonstration. already_trained: it was queued again and not trained again.
    """

    version: int
    loss: float | None = None
    report: dict[str, Any] = field(default_factory=dict)
    already_trained: bool = False

    def as_map(self) -> dict[str, Any]:
        """The plain map that is stored."""
        known: dict[str, Any] = {"version": self.version}
        if self.loss is not None:
            known["loss"] = self.loss
        if self.already_trained:
            known["already_trained"] = True
        return known | self.report


@dataclass
class Update:
    """What one call of `Step.run` did: one version of the weights, or none when every transcript was rejected.

    version, lineage: what the header beside the weights now says; `version` is None when nothing was trained.
    manifest: plain map for `weights:manifest:<version>` (tokens, loss, step_s, pause_s, ...).
    results: per trained job id, the job's result.
    rejected: per job id, why it was refused before any weight was touched. Every job is in exactly one of the two.
    """

    version: int | None
    lineage: str
    manifest: dict[str, Any] = field(default_factory=dict)
    results: dict[str, JobResult] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def result_maps(self) -> dict[str, dict[str, Any]]:
        """`results` as they are stored."""
        return {job_id: result.as_map() for job_id, result in self.results.items()}

    def record(self) -> VersionRecord:
        """What is committed, and what the weights' record area holds so that a restart can commit it."""
        assert self.version is not None, "nothing was trained"
        return VersionRecord(self.version, self.lineage, list(self.results), self.manifest, self.result_maps())


P = TypeVar("P", bound=Prepared)


class Step(Protocol[P]):
    """Trains. One successful `run` with a version is one optimizer step, already live in the served weights."""

    def prepare(self, job_id: str, transcript: Transcript) -> P:
        """Tokenize one transcript. Any exception fails this transcript alone; it runs under a time limit."""

    def run(self, prepared: Sequence[P]) -> Update:
        """Train one version. Never interrupted by signals or alarms.

        Raises `TornWeightsError`, `UnavailableError`, or any other exception with no weight touched: redis' where Redis
        is away, so that the jobs are put back until it is there; else the batch is halved until the transcript at fault
        stands alone.
        """
