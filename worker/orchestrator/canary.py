"""The canary set: conversations that are never trained, scored on the live weights every so many versions.

A loss beyond the bound puts training on hold (serving goes on) and, if asked, takes the weights back to the last
version that passed. Must not know: how a version is rebuilt, RQ.
Invariants: scoring changes no weight; it happens between two versions, in the worker's main thread; no text of the
set reaches logs or Redis.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from producer import keys
from producer.errors import TandemError
from producer.jsonl import read_transcripts
from worker.config.guard_options import GuardSettings
from worker.consumer.events import Hooks
from worker.data.examples import Example, ExampleBuilder, ExampleError
from worker.versions import ledger, pause_switch

log = logging.getLogger("tandem.worker")

GOOD = "canary_good"
"""Field of `weights:state`: the last version that passed."""

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
        return version % self.every == 0

    def look(self, version: int) -> Verdict:
        """Score the whole set now."""
        losses = self.score(self.examples)
        tokens = sum(example.trained_tokens for example in self.examples)
        total = sum(losses[example.id] * example.trained_tokens for example in self.examples)
        return Verdict(version, total / tokens, self.bound)


class CanaryHooks(Hooks):
    """Give this to `BatchWorker(hooks=[...])`: it looks after the versions that are due.

    rollback: takes the live weights back to a version and returns the new version that holds them; None: only hold.
    """

    def __init__(self, canary: Canary, connection: redis.Redis, rollback: Callable[[int], int] | None = None) -> None:
        self.canary, self.connection, self.rollback = canary, connection, rollback

    def on_version(self, line: dict[str, Any]) -> None:
        if self.canary.due(line["version"]):
            self.look(line["version"])

    def look(self, version: int) -> Verdict:
        """Score, say it, and act on it. Also for the start of a worker, when the weights may be of any version."""
        verdict = self.canary.look(version)
        fields: dict[Any, Any] = {"canary_loss": verdict.loss, "canary_version": version, "canary_at": ledger.utc()}
        if verdict.passed:
            fields[GOOD] = version
        with self.connection.pipeline() as pipe:
            pipe.hset(keys.STATE, mapping=fields)
            pause_switch.announce(
                pipe, "canary", {"version": version, "loss": verdict.loss, "passed": int(verdict.passed)}
            )
            pipe.execute()
        log.info("canary set at version %d: loss %.4f, bound %.4f", version, verdict.loss, verdict.bound)
        if not verdict.passed:
            self._failed(verdict)
        return verdict

    def _failed(self, verdict: Verdict) -> None:
        reason = f"the canary set's loss at version {verdict.version} is {verdict.loss:.4f}, above {verdict.bound:.4f}"
        pause_switch.hold(self.connection, reason)  # first: whatever becomes of the rollback, nothing more is trained
        log.error("training is on hold: %s", reason)
        if self.rollback is None:
            return
        raw: Any = self.connection.hget(keys.STATE, GOOD)
        if raw is None:
            log.error("no version passed before: nothing to roll back to")
            return
        try:
            made = self.rollback(int(raw))
        except TandemError as error:
            pause_switch.hold(self.connection, f"{reason}; rolling back to version {int(raw)} failed: {error}")
            log.error("rolling back to version %d failed: %s", int(raw), error)
            return
        pause_switch.hold(self.connection, f"{reason}; version {made} is version {int(raw)} again")
        log.warning("rolled back: version %d is version %d again", made, int(raw))


def canary_hooks(
    settings: GuardSettings,
    builder: ExampleBuilder,
    score: Score,
    connection: redis.Redis,
    rollback: Callable[[int], int],
) -> list[CanaryHooks]:
    """For `BatchWorker(hooks=...)`, beside its own: empty without a canary set."""
    if settings.canary is None or settings.canary_bound is None:
        return []
    canary = Canary(load(settings.canary, builder), score, every=settings.canary_every, bound=settings.canary_bound)
    return [CanaryHooks(canary, connection, rollback if settings.auto_rollback else None)]
