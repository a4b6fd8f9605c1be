"""Makes a version again: from which checkpoint, through which journaled batches, without whom.

Must not know: Redis.
Invariants: a plan has read and checked everything it needs before the first byte of the weights changes; nobody who was
ever dropped is in it; the header says APPLYING until the version is complete.
"""

import time
from dataclasses import dataclass, field

from producer.progress import progress
from worker.checkpoint import replay
from worker.checkpoint.ancestry import RebuildError, ids_of, perhaps_in, trace
from worker.checkpoint.batch_codec import ReplayError
from worker.checkpoint.history import History
from worker.checkpoint.journal import Entry
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.replay import CapacityOf, Make, Replayed
from worker.checkpoint.snapshots import SnapshotError
from worker.config.optimizers import MATRICES
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.header import APPLYING
from worker.utils.fault_injection import point
from worker.utils.stacks import is_stack


@dataclass(frozen=True)
class Plan:
    """How `version` is made: from the checkpoint of `base` (0: the source model), through the batches `steps`."""

    version: int
    base: int
    steps: list[UpdateRecord]
    dropped: frozenset[str] = frozenset()
    """Ids that are left out of every batch."""
    without: frozenset[str] = frozenset()
    """Those of them that were in a batch of `steps`."""
    passed_over: list[str] = field(default_factory=list)
    """Checkpoints that could not be taken, and why."""


@dataclass(frozen=True)
class Rebuilt:
    """What was made, from what, and what was not as the first time."""

    plan: Plan
    seconds: float
    replayed: Replayed


@dataclass(frozen=True)
class Compared:
    """The weights' digest now, and when the journal saw `version`."""

    version: int
    now: str
    then: str

    @property
    def same(self) -> bool:
        return self.now == self.then


class Rebuilder:
    """Of `weights`. make: makes a trainer on them; room: how many tokens that one takes at once."""

    def __init__(self, history: History, weights: AttachedWeights, make: Make, room: CapacityOf) -> None:
        self.history, self.weights, self.make_trainer, self.room = history, weights, make, room
        self.snapshots, self.journal = history.snapshots, history.journal
        self.device = weights.state.device

    def plan(self, version: int, dropped: frozenset[str] = frozenset()) -> Plan:
        """How to make `version` without the ids in `dropped` and without all that were dropped before, everything read
        and checked. Raises `RebuildError`."""
        passed_over: list[str] = []
        try:
            out = dropped | self.history.dropped().keys()
        except SnapshotError as error:
            raise RebuildError(f"version {version} cannot be made: {error}") from error

        def unusable(candidate: int) -> str | None:
            reason = self._unusable(candidate, out)
            if reason and candidate in self.snapshots.versions():
                passed_over.append(reason)
            return reason

        base, path = trace(self.journal.entries, version, unusable)
        if base == 0 and self.weights.server_info.get("load_format") == "dummy":
            raise RebuildError(
                f"version {version} cannot be made: the server began with random weights (--load-format dummy), which"
                " nobody can restore. Where the weights are torn or lost, restart the server (tandem serve ...), then"
                " run `tandem worker --new-lineage`"
            )
        steps = [self._read(entry) for entry in path]
        self._check_optimizer(version, base, steps)
        self._check_experts(version, base, steps)
        try:
            self.snapshots.check_layout(base, self.weights.tensors, self.weights.state)
            replay.check_steps(steps, self.snapshots.optimizer(base).steps_taken())
            replay.check_fits(steps, out, self.room)
        except (SnapshotError, ReplayError) as error:
            raise RebuildError(f"version {version} cannot be made: {error}") from error
        without = frozenset(id for entry in path for id in ids_of(entry) if id in out)
        return Plan(version, base, steps, out, without, passed_over)

    def _check_optimizer(self, version: int, base: int, steps: list[UpdateRecord]) -> None:
        """The server's optimizer is the one that trained `steps`, and that the checkpoint of `base` has the state of:
        another one's state has no place in the server's memory. Raises `RebuildError`."""
        ours = self.weights.optimizer
        found: set[str] = {replay.hyperparameters(record.h).rule for record in steps}
        kept = self.snapshots.optimizer(base).matrices(self.weights.tensors)
        found |= {name for name, matrices in MATRICES.items() if matrices == kept}
        if others := sorted(found - {ours}):
            raise RebuildError(
                f"version {version} cannot be made: it was trained with the optimizer {others[0]}, and this server was"
                f" started for {ours}; nothing was changed. Start the server with `tandem serve --optimizer"
                f" {others[0]}`; or train the weights of a checkpoint with {ours}, as a model of its own:"
                f" `tandem serve DIRECTORY --optimizer {ours}`"
            )

    def _check_experts(self, version: int, base: int, steps: list[UpdateRecord]) -> None:
        """No expert was trained by an older Tandem, to whose optimizer a layer's experts were one tensor: here they
        would take other steps. Raises `RebuildError`."""
        if not any(is_stack(tensor.shape) for tensor in self.weights.tensors.values()):
            return
        older = any(replay.hyperparameters(record.h).router is None for record in steps)
        if older or self.snapshots.optimizer(base).is_unstacked(self.weights.tensors):
            raise RebuildError(
                f"version {version} cannot be made: an older Tandem trained it, to whose optimizer a layer's experts"
                " were one tensor, and here each is a matrix of its own; nothing was changed. Use the Tandem that wrote"
                " it; or train the weights of a checkpoint as a model of its own: `tandem serve DIRECTORY`"
            )

    def _unusable(self, candidate: int, dropped: frozenset[str]) -> str | None:
        if candidate == 0:
            return None
        if candidate not in self.snapshots.versions():
            return "it has no checkpoint"
        try:
            self.snapshots.check(candidate)
            inside = perhaps_in(self.journal.entries, candidate, dropped, self.snapshots.trained(candidate))
        except SnapshotError as error:
            return str(error)
        return f"{min(inside)} may be in the checkpoint of version {candidate}" if inside else None

    def _read(self, entry: Entry) -> UpdateRecord:
        record = self.journal.read(entry.version)
        assert isinstance(record, UpdateRecord)
        return record

    def rebuild(self, plan: Plan, lineage: str, version: int) -> Rebuilt:
        """Make the weights what `plan` says and the header `lineage`, `version`.

        The server must be paused, and the header APPLYING. Whatever is raised leaves it so: the next start tries again.
        """
        header, started = self.weights.header, time.monotonic()
        assert header.state == APPLYING
        point("restoring")
        with progress(f"making version {plan.version} again", 1 + len(plan.steps), "steps") as shown:
            self.snapshots.restore(plan.base, self.weights.tensors, self.weights.state)
            shown.advance()
            replayed = replay.replay(
                plan.steps, plan.dropped, self.make_trainer, self.device, shown.advance, self.weights.rank_count
            )
        point("restored")
        header.adopt(lineage, version)
        return Rebuilt(plan, time.monotonic() - started, replayed)

    def compare(self, version: int) -> Compared | None:
        """The weights as they are, against those that the journal saw at `version`; None if it did not look."""
        entry = self.journal.entries.get(version)
        if entry is None or entry.digest is None or self.device.type != "cpu":
            return None
        return Compared(version, replay.digest(self.weights.tensors), entry.digest)

    def digest(self) -> str | None:
        """Of the weights as they are; None on a GPU, where bits are not promised."""
        return replay.digest(self.weights.tensors) if self.device.type == "cpu" else None
