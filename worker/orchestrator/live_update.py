"""The update protocol: a micro-batch becomes one version of the weights that are being served.

    burst:     forward, backward -> journal -> pause -> record -> APPLYING -> sweep -> CLEAN, version + 1 -> resume
    streaming: forward -> journal -> pause -> record -> APPLYING -> backward, applying -> CLEAN, version + 1 -> resume
    hogwild:   forward -> journal -> record -> APPLYING -> backward, applying -> CLEAN, version + 1 -> pause -> resume

Knows the trainer, the header beside the weights, the keeper of the journal and the server's control socket. Must not
know Redis or RQ: the drain commits the `Update` that comes back.

Invariants: a version is in the journal, on disk, before the server is paused for it; its record is complete before the
header says APPLYING, so a restarted worker that finds CLEAN and that version can commit it. The header says APPLYING
from before the first write until after the last. Whatever is raised before the first write leaves the header CLEAN,
the version unchanged and the server running. In burst, a gradient that is not finite is met before the first write; in
streaming anything that goes wrong under APPLYING leaves it so: the weights are torn, and made again at the next start.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from producer.errors import TandemError
from producer.transcript import Transcript
from worker.apollo import NonFiniteGradient
from worker.checkpoint.batch_codec import Ready, make_ready, unpack_ready
from worker.checkpoint.journal import JournalError
from worker.checkpoint.manager import Keeper
from worker.checkpoint.records import UpdateRecord
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import JobResult, Torn, Unavailable, Update
from worker.data.examples import ExampleBuilder
from worker.data.replay_buffer import Rehearsal
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.header import CLEAN, LeaseLostError
from worker.trainer.grad_norm import gradient_norm
from worker.trainer.outliers import GradientOutlier, Guards
from worker.trainer.trainer import Gradients, Trainer
from worker.utils.duty_cycle import Duty
from worker.utils.fault_injection import point
from worker.utils.signals import deferred


class SharedUpdate:
    """`worker.config.protocol.Step` on the weights of a live vLLM.

    `base` is the version that Redis will have when the next update is committed: by default the one before it; a run
    without Redis names the version it started from, so that a later worker can take over all of it at once.
    """

    def __init__(
        self,
        weights: AttachedWeights,
        control: ServerControl,
        trainer: Trainer,
        builder: ExampleBuilder,
        keeper: Keeper,
        h: Hyperparameters,
        *,
        base: int | None = None,
        guards: Guards | None = None,
        rehearsal: Rehearsal[Ready] | None = None,
        hogwild: bool = False,
        duty: Duty | None = None,
    ) -> None:
        self.weights = weights
        self.control = control
        self.trainer = trainer
        self.builder = builder
        self.keeper = keeper
        self.h = h
        self.base = base
        self.guards = guards
        self.rehearsal = rehearsal
        self.hogwild = hogwild
        self.duty = duty or Duty()
        self.confirm: Callable[[], None] = lambda: None
        """Called before each step; raises `Unavailable` when no version may be made now."""

    def check(self) -> None:
        """Raises `Unavailable` when the server has gone."""
        try:
            self.control.state()
        except TandemError as error:
            raise Unavailable(
                f"{error}. Start it again, then the worker: it brings the server back to what it had learnt"
            ) from error

    def prepare(self, job_id: str, transcript: Transcript) -> Ready:
        """Tokenize one transcript; raises `ExampleError` naming what is wrong with it."""
        return make_ready(transcript, self.builder.build(transcript, job_id))

    def remember(self) -> None:
        """Guards and rehearsal learn the ancestry of the live version, and nothing else: at the start, and whenever the
        weights have become those of another version. Nobody who was ever dropped is rehearsed."""
        history = self.keeper.history
        way = history.ancestry(self.weights.header.version)
        if self.guards is not None:
            self.guards.relearn(entry.manifest for entry in way)
        if self.rehearsal is not None:
            dropped = frozenset(history.dropped())
            records = (self.keeper.journal.read(e.version) for e in way if e.kind == "update" and not e.expired)
            updates = (record for record in records if isinstance(record, UpdateRecord))
            self.rehearsal.relearn(ready for record in updates for ready in unpack_ready(record, dropped))

    def run(self, prepared: Sequence[Ready]) -> Update:
        """Train one version on `prepared`. Raises `Torn`, `Unavailable`, or anything else with no weight touched."""
        if self.weights.header.state != CLEAN:
            raise Torn("the weights are torn: start the worker again, which restores them")
        self.confirm()
        with self.duty.work():
            try:
                return self._run(prepared)
            finally:
                self.trainer.forget()  # of what was not applied, gradients or a whole graph

    def _run(self, prepared: Sequence[Ready]) -> Update:
        header, started = self.weights.header, time.monotonic()
        batch = [*prepared, *(self.rehearsal.pick(header.version + 1, prepared) if self.rehearsal else [])]
        gradients = self.trainer.begin([ready.example for ready in batch], self.guards)
        begun = time.monotonic()
        update = self._plan(prepared, gradients)
        if not update.results:
            return Update(version=None, lineage=header.lineage, rejected=update.rejected)
        norm = None
        if self.guards is not None and not self.trainer.streaming:
            norm = gradient_norm(self.trainer.parameters())
            if reason := self.guards.norm_refusal(norm, gradients.trained_tokens):
                if len(prepared) > 1:
                    raise GradientOutlier(reason)
                return Update(version=None, lineage=header.lineage, rejected={ready.id: reason for ready in prepared})
        update.manifest["gradients_s"] = time.monotonic() - started
        if self.trainer.streaming:
            update.manifest["forward_s"] = begun - started
        self.trainer.optimizer.prepare()  # a GPU's new projections, where due: not under the pause
        trained = [ready for ready in batch if ready.id in gradients.nll]
        update.manifest |= Rehearsal.record(trained)
        if self.guards is not None:
            update.manifest |= Guards.measures({id: gradients.nll[id] for id in update.results}, norm)
        try:
            self.keeper.before(update, trained, self.h, self.trainer.optimizer.step_count)
        except JournalError as error:
            raise Unavailable(str(error)) from error
        with deferred():
            self._apply(update)
        if self.rehearsal is not None:
            self.rehearsal.add(trained)
        if self.guards is not None:
            self.guards.remember([update.manifest])
        assert update.version is not None
        self.keeper.after(update.version, update.manifest)
        return update

    def _plan(self, prepared: Sequence[Ready], gradients: Gradients) -> Update:
        version = self.weights.header.version + 1
        trained = [ready.example for ready in prepared if ready.id in gradients.nll]
        manifest: dict[str, Any] = {
            "kind": "update",
            "way": "hogwild" if self.hogwild else "streaming" if self.trainer.streaming else "burst",
            "base": version - 1 if self.base is None else self.base,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "jobs": len(trained),
            "tokens": gradients.tokens,
            "trained_tokens": gradients.trained_tokens,
            "loss": gradients.loss,
        }
        results = {e.id: JobResult(version, gradients.nll[e.id], e.report) for e in trained}
        rejected = {e.id: gradients.rejected[e.id] for e in prepared if e.id in gradients.rejected}
        return Update(version, self.weights.header.lineage, manifest, results, rejected)

    def _apply(self, update: Update) -> None:
        """Pause, write, resume; fills the manifest's measurements."""
        header, before = self.weights.header, self.weights.header.version
        assert update.version is not None
        asked = time.monotonic()
        self._take_lease(update.version)
        leased = time.monotonic()
        point("paused")
        try:
            self.weights.record.write(update.record().plain())
            header.begin(self.control.fence)
            point("applying")
            measured = self._write(update.version)
        except Torn:
            raise
        except LeaseLostError as error:
            self.keeper.void(update.version)
            raise Unavailable(str(error)) from error
        except BaseException:
            self.keeper.void(update.version)  # nothing was written
            self._end_lease(before)
            raise
        header.finish(update.version)
        point("applied")
        written = time.monotonic()
        paused = self._end_lease(update.version)
        point("resumed")
        done = time.monotonic()
        waited = {"wait_for_pause_s": paused - written, "pause_s": done - paused}
        if not self.hogwild:
            waited = {"wait_for_pause_s": leased - asked, "pause_s": done - leased}
        update.manifest |= measured | {"sweep_s": written - leased} | waited

    def _take_lease(self, version: int) -> None:
        """The server is paused, or knows that it will be written to while it serves; in both cases it watches us."""
        try:
            if self.hogwild:
                self.control.begin_hogwild()
            else:
                self.control.pause()
        except TandemError as error:
            self.keeper.void(version)
            raise Unavailable(f"the server could not be paused: {error}") from error

    def _write(self, version: int) -> dict[str, float]:
        """All writes of the update, under APPLYING, and their end awaited; CLEAN again if a burst was refused."""
        started = time.monotonic()
        try:
            measured = self.trainer.apply()
            self.trainer.optimizer.check()  # on CUDA a refused gradient is known only once the device has answered
        except NonFiniteGradient as error:
            if not self.trainer.streaming:
                self.weights.header.abandon()
                raise
            self.keeper.void(version)  # it must not be tried again when the weights are restored
            raise Torn(
                f"{error}, and a part of version {version} was written already: the weights are torn, and the server"
                " refuses requests; start the worker again, which restores them"
            ) from error
        except BaseException as error:
            raise Torn(
                f"the update to version {version} broke off while it was written: {error}; the weights are torn: start"
                " the worker again, which restores them"
            ) from error
        return measured | ({"backward_s": time.monotonic() - started} if self.trainer.streaming else {})

    def _end_lease(self, version: int) -> float:
        """Let the server go on under `version`; time.monotonic() of when it stood still, at the latest."""
        try:
            if self.hogwild:
                self.control.pause()  # drops what was computed with weights of two versions
            paused = time.monotonic()
            self.control.resume(version)
            return paused
        except TandemError as error:
            # The header is CLEAN: the server resumes by itself when our connection ends, and the record is committed
            # at the next start.
            raise Unavailable(f"the server could not be resumed at version {version}: {error}") from error
