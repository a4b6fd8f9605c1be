"""The update protocol: a micro-batch becomes one version of the weights that are being served, in five stages.

    compute   gradients, or in streaming the forward pass; no weight changes
    screen    what is refused: transcripts that cannot be trained, batches that are outliers
    journal   the version on disk, before the server is paused for it
    apply     pause, write, resume: `applying`
    observe   guards, rehearsal and journal learn of the live version

Knows the trainer, the header beside the weights, the manager of the journal and the server's control socket. The
consumer commits the `Update` that comes back.

Invariants: a version is in the journal, on disk, before the server is paused for it. Whatever `run` raises besides
`TornWeightsError` and `UnavailableError` means that no weight was touched, so that the batch may be tried again in
parts; nothing that fails once the version is live is raised as anything else.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from producer.transcript import Transcript
from worker.checkpoint.batch_codec import Ready, make_ready, unpack_ready
from worker.checkpoint.journal import JournalError
from worker.checkpoint.records import UpdateRecord
from worker.config.protocol import JobResult, TornWeightsError, UnavailableError, Update
from worker.data.replay_buffer import ReplayBuffer
from worker.distributed.errors import GroupLostError
from worker.orchestrator.applying import apply_update
from worker.orchestrator.dislikes import DislikeGuard
from worker.orchestrator.lone import Lone
from worker.orchestrator.serving_cost import ServingCost
from worker.orchestrator.session import Session
from worker.shared_weights.header import CLEAN
from worker.trainer.gradients import Gradients
from worker.trainer.losses import imitates
from worker.trainer.outliers import GradientOutlierError, Guards
from worker.trainer.teachers import Teachers
from worker.trainer.threads import TrainingThreads
from worker.utils.serving_budget import ServingBudget
from worker.utils.signals import deferred


@dataclass(frozen=True)
class Computed:
    """What stands before anything is decided.

    prepared: the batch's own transcripts, in order; batch: with what is rehearsed; seconds: of the whole stage.
    """

    prepared: Sequence[Ready]
    batch: Sequence[Ready]
    gradients: Gradients
    norm: float | None
    """The gradient's L2 norm, where guards ask for it, there is one before the write, and all is imitated."""
    forward_s: float
    seconds: float

    @property
    def trained(self) -> list[Ready]:
        """All that the gradients come from, in order."""
        return [ready for ready in self.batch if ready.id in self.gradients.nll]

    @property
    def new(self) -> list[Ready]:
        """Those of them that are trained for the first time."""
        return [ready for ready in self.prepared if ready.id in self.gradients.nll]

    @property
    def dislikes_share(self) -> float:
        """The part of the step that disliked answers have."""
        return sum(self.gradients.shares[ready.id] for ready in self.trained if ready.example.kind == "disliked")

    @property
    def rejected(self) -> dict[str, str]:
        """Why each of the batch's other transcripts is not."""
        found = self.gradients.rejected
        return {ready.id: found[ready.id] for ready in self.prepared if ready.id in found}


class LiveUpdate:
    """`worker.config.protocol.Step` on the weights of a live vLLM.

    base: the version that Redis will have when the next update is committed: by default the one before it; a run
    without Redis names the version it started from, so that a later worker can take over all of it at once. confirm:
    called before each step; raises `UnavailableError` when no version may be made now. fleet: the other replicas; none
    by default.
    """

    def __init__(
        self,
        session: Session,
        *,
        base: int | None = None,
        guards: Guards | None = None,
        dislikes: DislikeGuard[Teachers] | None = None,
        rehearsal: ReplayBuffer[Ready] | None = None,
        threads: TrainingThreads | None = None,
        confirm: Callable[[], None] = lambda: None,
        fleet: Lone | None = None,
    ) -> None:
        self.session = session
        self.base = base
        self.guards = guards
        self.dislikes = dislikes
        self.rehearsal = rehearsal
        self.threads = threads
        self.confirm = confirm
        self.fleet = fleet or Lone()
        self.cost = ServingCost(session, ServingBudget(session.settings.serving_share))
        self.remember()

    def remember(self) -> None:
        """Guards and rehearsal learn the ancestry of the live version, and nothing else: at the start, and whenever the
        weights have become those of another version. Nobody who was ever dropped is rehearsed."""
        manager = self.session.manager
        way = manager.history.ancestry(self.session.weights.header.version)
        if self.guards is not None:
            self.guards.relearn(entry.manifest for entry in way)
        if self.dislikes is not None:
            self.dislikes.relearn(entry.manifest for entry in way)
        if self.rehearsal is not None:
            dropped = frozenset(manager.history.dropped())
            records = (manager.journal.read(e.version) for e in way if e.kind == "update" and not e.expired)
            updates = (record for record in records if isinstance(record, UpdateRecord))
            self.rehearsal.relearn(ready for record in updates for ready in unpack_ready(record, dropped))

    def prepare(self, job_id: str, transcript: Transcript) -> Ready:
        """Tokenize one transcript; raises `ExampleError` naming what is wrong with it."""
        return make_ready(transcript, self.session.builder.build(transcript, job_id))

    def run(self, prepared: Sequence[Ready]) -> Update:
        """Train one version on `prepared`. Raises `TornWeightsError`, `UnavailableError`, or anything else with no
        weight touched."""
        if self.session.weights.header.state != CLEAN:
            raise TornWeightsError("the weights are torn: start the worker again, which restores them")
        self.confirm()
        if self.threads is not None:
            self.threads.begin_version(self.session.trainer.device, self.session.weights.rank_count)
        self.cost.begin()
        try:
            return self.fleet.attempt(lambda: self._run(prepared))
        finally:
            self.session.trainer.forget()  # of what was not applied, gradients or a whole graph

    def _run(self, prepared: Sequence[Ready]) -> Update:
        with self.cost.computing(self.session.trainer.device_time):
            computed = self._compute(prepared)
        if (rejected := self._screen(computed)) is not None:
            return Update(version=None, lineage=self.session.weights.header.lineage, rejected=rejected)
        update = self._journal(computed)
        self.fleet.apply()
        beside = self.cost.computing() if self.session.settings.hogwild else nullcontext()
        with deferred(), self.cost.standing_still(), beside:
            update.manifest |= apply_update(self.session, update, self.fleet.others)
        self._observe(computed, update)
        return update

    def _compute(self, prepared: Sequence[Ready]) -> Computed:
        trainer, started = self.session.trainer, time.monotonic()
        version = self.session.weights.header.version + 1
        batch = [*prepared, *(self.rehearsal.pick(version, prepared) if self.rehearsal else [])]
        examples = [ready.example for ready in batch]
        refused = self.dislikes.refusals(version - 1, examples) if self.dislikes is not None else {}
        self.fleet.begin([ready for ready in batch if ready.id not in refused], self.guards)
        gradients = trainer.begin([one for one in examples if one.id not in refused], self.guards)
        gradients.rejected.update(refused)
        begun = time.monotonic()
        # By factors it is also what refuses a gradient that is not finite: under the pause that would be half-way.
        asked = self.guards is not None or trainer.begun == "factors"
        norm = trainer.gradient_norm() if asked and gradients.nll else None
        if not all(imitates(ready.example.kind) for ready in batch if ready.id in gradients.nll):
            norm = None  # of a loss that vanishes it says nothing, and nothing about those of demonstrations
        trainer.prepare()  # a GPU's new projections, where due: not under the pause
        self.fleet.agreed()
        return Computed(prepared, batch, gradients, norm, begun - started, time.monotonic() - started)

    def _screen(self, computed: Computed) -> dict[str, str] | None:
        """None: the batch is to be trained. Else why nobody of it is, by id; raises `GradientOutlierError` when it may
        be one of several that is to blame."""
        if not computed.new:
            return computed.rejected
        reason = None
        if self.guards is not None and computed.norm is not None:
            found = computed.gradients
            reason = self.guards.norm_refusal(computed.norm, found.effective_tokens, found.loss)
        if reason is None:
            return None
        if len(computed.prepared) > 1:
            raise GradientOutlierError(reason)
        return {ready.id: reason for ready in computed.prepared}

    def _journal(self, computed: Computed) -> Update:
        """The version, on disk. Raises `UnavailableError` when it cannot be written."""
        header, version = self.session.weights.header, self.session.weights.header.version + 1
        gradients = computed.gradients
        results = {
            ready.id: JobResult(version, gradients.nll[ready.id], ready.example.report) for ready in computed.new
        }
        update = Update(version, header.lineage, self._manifest(computed, version), results, computed.rejected)
        started, manager = time.monotonic(), self.session.manager
        self.fleet.journal(update)
        try:
            step = self.session.trainer.optimizer.step_count
            manager.before(update, computed.trained, self.session.h, step, self.fleet.parts)
        except JournalError as error:
            raise UnavailableError(str(error)) from error
        try:
            self.fleet.agreed()
        except GroupLostError:
            manager.void(version)
            raise
        update.manifest["journal_s"] = time.monotonic() - started
        return update

    def _manifest(self, computed: Computed, version: int) -> dict[str, Any]:
        """What is known of the version before it is applied."""
        gradients, way = computed.gradients, self.session.trainer.begun
        manifest: dict[str, Any] = {
            "kind": "update",
            "way": "hogwild" if self.session.settings.hogwild else way,
            "optimizer": self.session.h.rule,
            "base": version - 1 if self.base is None else self.base,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "jobs": len(computed.new),
            "tokens": gradients.tokens,
            "trained_tokens": gradients.trained_tokens,
            "loss": gradients.loss,
            "gradients_s": computed.seconds,
        }
        manifest |= {"forward_s": computed.forward_s} if way == "streaming" else {}
        manifest |= {"graphs": True} if self.session.trainer.replayed else {}
        manifest |= {"replicas": self.fleet.parts} if self.fleet.parts > 1 else {}
        manifest |= {"ranks": ranks} if (ranks := self.session.weights.rank_count) > 1 else {}
        manifest |= ReplayBuffer.record(computed.trained) | _kinds(computed)
        if self.guards is not None:
            nll = {ready.id: gradients.nll[ready.id] for ready in computed.new if imitates(ready.example.kind)}
            manifest |= Guards.measures(nll, computed.norm, gradients.effective_tokens)
        return manifest

    def _observe(self, computed: Computed, update: Update) -> None:
        """The version is live. Raises `UnavailableError` when any of this fails: the next start commits the version."""
        assert update.version is not None
        try:
            self.fleet.roll()
            if self.dislikes is not None:
                with self.cost.computing():
                    update.manifest |= self.dislikes.after(update.version, computed.dislikes_share)
            update.manifest |= self.cost.take()
            if self.rehearsal is not None:
                self.rehearsal.add(computed.trained)
            if self.guards is not None:
                self.guards.remember([update.manifest])
            self.fleet.after(update)
            self.session.manager.after(update.version, update.manifest)
            self.fleet.compared()
        except Exception as error:
            raise UnavailableError(
                f"version {update.version} is live, but the worker cannot go on from it ({type(error).__name__}): start"
                " the worker again; it then commits the version"
            ) from error


def _kinds(computed: Computed) -> dict[str, Any]:
    """What the manifest says of kinds of feedback, where there are others than demonstrations: of each, how many jobs
    there were and their mean loss."""
    losses: dict[str, list[float]] = {}
    for ready in computed.new:
        losses.setdefault(ready.example.kind, []).append(computed.gradients.losses[ready.id])
    if losses.keys() <= {"demonstration"}:
        return {}
    return {"kinds": {kind: {"jobs": len(of), "loss": sum(of) / len(of)} for kind, of in sorted(losses.items())}}
