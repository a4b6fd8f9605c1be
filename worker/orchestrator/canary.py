"""Canary sets: conversations that are never trained, scored on the live weights every so many versions.

Each has a name, by which the version's manifest keeps its loss. A loss beyond a set's bound, or a set that cannot be
scored, pauses training (serving goes on); a loss beyond the bound also takes the weights back to the last version that
passed, if asked. A set without a bound is only watched.
Invariants: scoring changes no weight; it happens between two versions, as a step of the worker's loop, so that what
goes wrong in a rollback ends the worker; no text of the set reaches logs or Redis.
"""

import json
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
from worker.config.guard_options import CANARY, GuardSettings
from worker.config.protocol import UnavailableError
from worker.consumer.error_text import told
from worker.data.examples import Example, ExampleBuilder, ExampleError
from worker.orchestrator.reports import CanaryFailed, CanaryNotScored, CanaryScored, NothingPassed, Report, sentence
from worker.orchestrator.rollback import RollbackError
from worker.versions import ledger, pause_switch

log = logging.getLogger("tandem.worker")

GOOD, VERSION = "canary_good", "canary_version"
"""Fields of `weights:state`: the last version that passed, and the last one that was judged."""
LOSS, LOSSES = "canary_loss", "canary_losses"
"""Fields of `weights:state`, of the version that was scored last: the first set's loss; JSON of all by name, null for
one that is not finite."""
MANIFEST = "canary"
"""Field of a scored version's manifest: the same JSON. Manifests of versions that were not scored have none."""

Score = Callable[[Sequence[Example]], dict[str, float]]
"""Mean loss by example id, without gradients: `Trainer.score`."""


class CanaryError(TandemError):
    """The canary file cannot be used."""


def load(file: Path, builder: ExampleBuilder, name: str = CANARY) -> list[Example]:
    """The conversations of a JSONL file, the set `name`. Raises `CanaryError` naming the first bad line."""
    examples = []
    for line, transcript in read_transcripts(str(file)):
        if isinstance(transcript, Exception):
            raise CanaryError(f"--canary {file}, line {line}: {transcript}") from transcript
        if transcript.kind in ("disliked", "correction", "comment"):
            raise CanaryError(f"--canary {file}, line {line}: is {transcript.kind}; a canary set holds answers to keep")
        try:
            examples.append(builder.build(transcript, f"{name}-{line}"))
        except ExampleError as error:
            raise CanaryError(f"--canary {file}, line {line}: {error}") from error
    if not examples:
        raise CanaryError(f"--canary {file} holds no conversations")
    return examples


@dataclass(frozen=True)
class CanarySet:
    """bound: the highest loss that passes; None: it is only watched."""

    name: str
    examples: Sequence[Example]
    bound: float | None = None


@dataclass(frozen=True)
class Scored:
    """A set's loss at a version, in nats per trained token over the whole set."""

    name: str
    loss: float
    bound: float | None

    @property
    def passed(self) -> bool:
        return self.bound is None or (math.isfinite(self.loss) and self.loss <= self.bound)


@dataclass(frozen=True)
class Verdict:
    """All sets at a version, in the order of the flags."""

    version: int
    sets: tuple[Scored, ...]

    @property
    def failed(self) -> Scored | None:
        """The first that did not pass."""
        return next((one for one in self.sets if not one.passed), None)

    def plain(self) -> str:
        """JSON of the losses by name."""
        return json.dumps({one.name: one.loss if math.isfinite(one.loss) else None for one in self.sets})


class Canary:
    """Scores `sets` at every `every`-th version."""

    def __init__(self, sets: Sequence[CanarySet], score: Score, *, every: int) -> None:
        if every < 1 or any(one.bound is not None and not one.bound > 0 for one in sets):
            raise CanaryError("--canary-every must be at least 1, and --canary-bound above 0")
        self.sets, self.score, self.every = list(sets), score, every

    def due(self, version: int) -> bool:
        return version > 0 and version % self.every == 0

    def look(self, version: int) -> Verdict:
        """Score all sets now, each on its own."""
        return Verdict(version, tuple(self._scored(one) for one in self.sets))

    def _scored(self, one: CanarySet) -> Scored:
        losses = self.score(one.examples)
        tokens = sum(example.trained_tokens for example in one.examples)
        total = sum(losses[example.id] * example.trained_tokens for example in one.examples)
        return Scored(one.name, total / tokens, one.bound)

    @staticmethod
    def of(settings: GuardSettings, builder: ExampleBuilder, score: Score) -> "Canary | None":
        """The one that the flags ask for, if any. Raises `CanaryError`."""
        if not settings.canary:
            return None
        sets = [CanarySet(name, load(file, builder, name), settings.bound_of(name)) for name, file in settings.canary]
        return Canary(sets, score, every=settings.canary_every)


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

        Raises redis errors, after which it is taken again; `UnavailableError` when the server has gone; and whatever a
        rollback raises after its first write: the worker must end then.
        """
        if not self.canary.due(version) or version == self._done:
            return
        if self._done is None and self._field(VERSION) == version:
            self._done = version  # by the worker before this one
            return
        try:
            verdict = self.canary.look(version)
        except UnavailableError:  # the server has gone: that says nothing of the version, which is scored later
            raise
        except Exception as error:
            log.error("scoring the canary set failed:\n%s", told(error))
            self._hold(CanaryNotScored(version, type(error).__name__))
            self._done = version
            return
        for one in verdict.sets:
            self.tell(CanaryScored(version, one.loss, one.bound, one.name))
        if verdict.failed is not None:
            self._failed(version, verdict.failed)
        self._note(verdict)
        self._done = version

    def _failed(self, version: int, one: Scored) -> None:
        assert one.bound is not None
        failed = CanaryFailed(version, one.loss, one.bound, name=one.name)
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
        first, passed, manifest = verdict.sets[0], verdict.failed is None, keys.manifest(verdict.version)
        fields: dict[Any, Any] = {LOSS: first.loss, LOSSES: verdict.plain(), VERSION: verdict.version}
        fields["canary_at"] = ledger.utc()
        if passed:
            fields[GOOD] = verdict.version
        entry = {"version": verdict.version, "loss": first.loss, "losses": verdict.plain(), "passed": int(passed)}
        entry["failed"] = json.dumps([one.name for one in verdict.sets if not one.passed])
        kept = self.connection.exists(manifest)
        with self.connection.pipeline() as pipe:
            pipe.hset(keys.STATE, mapping=fields)
            if kept:
                pipe.hset(manifest, MANIFEST, verdict.plain())
            pause_switch.announce(pipe, "canary", entry)
            pipe.execute()

    def _field(self, name: str) -> int | None:
        raw: Any = self.connection.hget(keys.STATE, name)
        return int(raw) if raw is not None else None
