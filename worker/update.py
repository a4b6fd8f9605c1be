"""The update protocol: a micro-batch becomes one version of the weights that are being served.

    gradients (server serving) -> pause -> record -> APPLYING -> optimizer sweep -> CLEAN, version + 1 -> resume

Knows the trainer, the header beside the weights and the server's control socket. Must not know Redis or RQ: the drain
commits the `Update` that comes back.

Invariants: the record of a version is complete before the header says APPLYING, so a restarted worker that finds CLEAN
and that version can commit it. The header says APPLYING from before the first write until after the last. Whatever is
raised before the first write leaves the header CLEAN, the version unchanged and the server running.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.apollo import NonFiniteGradient
from worker.examples import Example, ExampleBuilder
from worker.faults import point
from worker.serving.client import ServerControl
from worker.step import Torn, Unavailable, Update
from worker.trainer import Gradients, Trainer
from worker.weights.attach import AttachedWeights


class SharedUpdate:
    """`worker.step.Step` on the weights of a live vLLM.

    `base` is the version that Redis will have when the next update is committed: by default the one before it; a run
    without Redis names the version it started from, so that a later worker can take over all of it at once.
    """

    def __init__(
        self,
        weights: AttachedWeights,
        control: ServerControl,
        trainer: Trainer,
        builder: ExampleBuilder,
        *,
        base: int | None = None,
    ) -> None:
        self.weights = weights
        self.control = control
        self.trainer = trainer
        self.builder = builder
        self.base = base

    def check(self) -> None:
        """Raises `Unavailable` when the server has gone."""
        try:
            self.control.state()
        except TandemError as error:
            raise Unavailable(
                f"{error}. What it had learnt is lost with it: a worker on a new server needs --new-lineage"
            ) from error

    def prepare(self, job_id: str, transcript: Transcript) -> Example:
        """Tokenize one transcript; raises `ExampleError` naming what is wrong with it."""
        return self.builder.build(transcript, job_id)

    def run(self, prepared: Sequence[Example]) -> Update:
        """Train one version on `prepared`. Raises `Torn`, `Unavailable`, or anything else with no weight touched."""
        header = self.weights.header
        started = time.monotonic()
        gradients = self.trainer.backward(prepared)
        computed = time.monotonic()
        if not gradients.nll:
            return Update(version=None, lineage=header.lineage, rejected=gradients.rejected)
        update = self._plan(prepared, gradients)
        update.manifest["gradients_s"] = computed - started
        self.trainer.optimizer.prepare()  # new projections, where they are due: not while the server stands still
        self._apply(update)
        return update

    def _plan(self, prepared: Sequence[Example], gradients: Gradients) -> Update:
        version = self.weights.header.version + 1
        trained = [example for example in prepared if example.id in gradients.nll]
        manifest: dict[str, Any] = {
            "kind": "update",
            "base": version - 1 if self.base is None else self.base,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "jobs": len(trained),
            "tokens": gradients.tokens,
            "trained_tokens": gradients.trained_tokens,
            "loss": gradients.loss,
        }
        results = {e.id: {"version": version, "loss": gradients.nll[e.id], **e.report} for e in trained}
        return Update(version, self.weights.header.lineage, manifest, results, gradients.rejected)

    def _apply(self, update: Update) -> None:
        """Pause, sweep, resume; fills the manifest's measurements."""
        header, before = self.weights.header, self.weights.header.version
        assert update.version is not None
        asked = time.monotonic()
        try:
            self.control.pause()
        except TandemError as error:
            raise Unavailable(f"the server could not be paused: {error}") from error
        paused = time.monotonic()
        point("paused")
        try:
            self.weights.record.write(update.record())
            header.begin()
            point("applying")
            measured = self._sweep(update.version)
        except Torn:
            raise
        except BaseException:
            self._resume(before)  # nothing was written
            raise
        header.finish(update.version)
        point("applied")
        swept = time.monotonic()
        self._resume(update.version)
        point("resumed")
        done = time.monotonic()
        update.manifest |= measured | {
            "wait_for_pause_s": paused - asked,
            "sweep_s": swept - paused,
            "pause_s": done - paused,
        }

    def _sweep(self, version: int) -> dict[str, float]:
        """The optimizer step, under APPLYING; CLEAN again if it was refused before its first write."""
        try:
            return self.trainer.apply()
        except NonFiniteGradient:
            self.weights.header.abandon()
            raise
        except BaseException as error:
            raise Torn(f"the update to version {version} broke off in the sweep: {error}") from error

    def _resume(self, version: int) -> None:
        try:
            self.control.resume(version)
        except TandemError as error:
            # The header is CLEAN: the server resumes by itself when our connection ends, and the record is committed
            # at the next start.
            raise Unavailable(f"the server could not be resumed at version {version}: {error}") from error
