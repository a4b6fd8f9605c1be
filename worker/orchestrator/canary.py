"""The canary set: conversations that are never trained, scored on the live weights every so many versions.

A loss beyond the bound, or a set that cannot be scored, pauses training (serving goes on); a loss beyond the
bound also takes the weights back to the last version that passed, if asked.
Invariants: scoring changes no weight; it happens between two versions, as a step of the worker's loop, so that what
goes wrong in a rollback ends the worker; no text of the set reaches logs or Redis.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis

from producer import keys
from producer.errors import TandemError
from producer.jsonl import read_transcripts
from worker.checkpoint.ancestry import RebuildError
from worker.checkpoint.journal import JournalError
from worker.checkpoint.snapshots import SnapshotError
from worker.config.guard_options import GuardSettings
from worker.consumer.error_text import told
from worker.data.examples import Example, ExampleBuilder, ExampleError
from worker.orchestrator.reports import CanaryFailed, CanaryNotScored, CanaryScored, NothingPassed, Report, sentence
from worker.orchestrator.rollback import RollbackError
from worker.versions import ledger, pause_switch

log = logging.getLogger("tandem.worker")

GOOD, VERSION = "canary_good", "canary_version"
"""Fields of `weights:state`: the last version that passed, and the last one that was judged."""

Score = Callable[[Sequence[Example]], dict[str, float]]
"""Mean loss by example id, without gradients: `Trainer.score`."""


class CanaryError(TandemError):
    """The canary file cannot be used."""


def load(file: Path, builder: ExampleBuilder) -> list[Example]:
    """The conversations of a JSONL file. Raises `CanaryError` naming the first bad line."""
    examples = []
    for line, transcript in read_transcripts(str(file)):
        if isinstance(transcript, Exception):
            raise CanaryError(f"--canary {file}, line {line}: {transcript}") from transcript
        if transcript.kind in ("disliked", "correction", "comment"):
            raise CanaryError(f"--canary {file}, line {line}: is {transcript.kind}; a canary set holds answers to keep")
        try:
            examples.append(builder.build(transcript, f"canary-{line}"))
        except ExampleError as error:
            raise CanaryError(f"--canary {file}, line {line}: {error}") from error
    if not examples:
        raise CanaryError(f"--canary {file} holds no conversations")
    return examples


@dataclass(frozen=True)
class Verdict:
    """The set's loss at a version, in nats per trained token over the whole set."""

    version: int
    loss: float
    bound: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.loss) and self.loss <= self.bound


class Canary:
    """Scores `examples` at every `every`-th version; `bound` is the highest loss that passes."""

    def __init__(self, examples: Sequence[Example], score: Score, *, every: int, bound: float) -> None:
        if every < 1 or not bound > 0:
            raise CanaryError("--canary-every must be at least 1, and --canary-bound above 0")
        self.examples, self.score, self.every, self.bound = list(examples), score, every, bound

    def due(self, version: int) -> bool:
        return version > 0 and version % self.every == 0

    def look(self, version: int) -> Verdict:
        """Score the whole set now."""
        losses = self.score(self.examples)
        tokens = sum(example.trained_tokens for example in self.examples)
        total = sum(losses[example.id] * example.trained_tokens for example in self.examples)
        return Verdict(version, total / tokens, self.bound)

    @staticmethod
    def of(settings: GuardSettings, builder: ExampleBuilder, score: Score) -> "Canary | None":
        """The one that the flags ask for, if any. Raises `CanaryError`."""
        if settings.canary is None or settings.canary_bound is None:
            return None
        examples = load(settings.canary, builder)
        return Canary(examples, score, every=settings.canary_every, bound=settings.canary_bound)


class CanaryStep:
    """The canary as a step of the worker's loop: `take` it between two versions.

    roll_back: takes the live weights back to a version and returns the new version that holds them; None: only hold.
    tell: is given what happened.
    """

    def __init__(
        self,
        canary: Canary,
        connection: redis.Redis,
        roll_back: Callable[[int], int] | None = None,
        tell: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.canary, self.connection, self.roll_back, self.tell = canary, connection, roll_back, tell
        self._done: int | None = None

    def take(self, version: int) -> None:
        """Score the live `version` if it is due, and act on it; once, also over a restart that came in between.

        Raises redis errors, after which it is taken again, and whatever a rollback raises after its first write: the
        worker must end then.
        """
        if not self.canary.due(version) or version == self._done:
            return
        if self._done is None and self._field(VERSION) == version:
            self._done = version  # by the worker before this one
            return
        try:
            verdict = self.canary.look(version)
        except Exception as error:
            log.error("scoring the canary set failed:\n%s", told(error))
            self._hold(CanaryNotScored(version, type(error).__name__))
            self._done = version
            return
        self.tell(CanaryScored(version, verdict.loss, verdict.bound))
        if not verdict.passed:
            self._failed(verdict)
        self._note(verdict)
        self._done = version

    def _failed(self, verdict: Verdict) -> None:
        failed = CanaryFailed(verdict.version, verdict.loss, verdict.bound)
        self._hold(failed)  # first: whatever becomes of the rollback, nothing more is trained
        if self.roll_back is None:
            return
        good = self._field(GOOD)
        if good is None:
            self.tell(NothingPassed())
            return
        try:
            made = self.roll_back(good)
        except (RollbackError, RebuildError, JournalError, SnapshotError) as error:  # nothing was changed
            self._hold(replace(failed, target=good, problem=str(error)))
            return
        self._hold(replace(failed, target=good, made=made))

    def _hold(self, why: CanaryFailed | CanaryNotScored) -> None:
        pause_switch.pause(self.connection, sentence(why))
        self.tell(why)

    def _note(self, verdict: Verdict) -> None:
        """Say in Redis what was found; last, so that a worker that dies before it finds it undone."""
        fields: dict[Any, Any] = {"canary_loss": verdict.loss, VERSION: verdict.version, "canary_at": ledger.utc()}
        if verdict.passed:
            fields[GOOD] = verdict.version
        entry = {"version": verdict.version, "loss": verdict.loss, "passed": int(verdict.passed)}
        with self.connection.pipeline() as pipe:
            pipe.hset(keys.STATE, mapping=fields)
            pause_switch.announce(pipe, "canary", entry)
            pipe.execute()

    def _field(self, name: str) -> int | None:
        raw: Any = self.connection.hget(keys.STATE, name)
        return int(raw) if raw is not None else None
