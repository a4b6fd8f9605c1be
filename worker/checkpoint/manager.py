"""Keeps what the weights of one server have learnt: the way into the journal, and the parts that read it.

    manager.before, void, after, adopt   versions enter the journal, before and after they are applied
    manager.history                      what there is on disk
    manager.checkpoints                  writes checkpoints, and prunes
    manager.rebuilder                    makes a version again

Must not know: Redis.
Invariant: a version's record is on disk before the header says APPLYING.
"""

import logging
from collections.abc import Sequence
from typing import Any

from worker.checkpoint import replay
from worker.checkpoint.batch_codec import Ready, pack_batch
from worker.checkpoint.checkpoint_writer import CheckpointWriter
from worker.checkpoint.history import History
from worker.checkpoint.journal import Journal, JournalError, TornTail
from worker.checkpoint.rebuild import Rebuilder
from worker.checkpoint.records import DIVIDED_FORMAT, UPDATE_FORMAT, LineageRecord, Measured, UpdateRecord
from worker.checkpoint.replay import CapacityOf, Make
from worker.checkpoint.snapshots import HalfRemoved, NoFiles, Snapshots, Trained
from worker.checkpoint.state_dir import StateDir
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import Update
from worker.config.retention import Policy
from worker.shared_weights.attach import AttachedWeights
from worker.utils.fault_injection import point

log = logging.getLogger("tandem")

Notice = TornTail | HalfRemoved | NoFiles
"""What was found when the state directory was opened."""


class CheckpointManager:
    """Of `weights`; `state` is open.

    make: makes a trainer on the weights; room: how many tokens that one takes at once. policy None: nothing is pruned
    (a command that visits a worker's state directory does not know what that worker keeps).
    """

    def __init__(
        self, state: StateDir, weights: AttachedWeights, make: Make, room: CapacityOf, policy: Policy | None
    ) -> None:
        self.weights, self.policy, self.folder = weights, policy, state.path
        snapshots = Snapshots(state.checkpoints, weights.model_path)
        self.journal = Journal(state.journal, snapshots.fingerprint)
        self.notices: list[Notice] = [*self.journal.notices, *snapshots.notices]
        self.history = History(self.journal, snapshots)
        self.checkpoints = CheckpointWriter(self.history, weights, policy)
        self.rebuilder = Rebuilder(self.history, weights, make, room)

    def before(self, update: Update, batch: Sequence[Ready], h: Hyperparameters, step: int, parts: int = 1) -> None:
        """Journal `update`, about to be applied as the optimizer's step after `step`. batch: all that its gradients
        come from, in order; parts: among how many replicas it was divided. Raises `JournalError`."""
        assert update.version is not None
        record = UpdateRecord(
            version=update.version,
            lineage=update.lineage,
            parent=self.weights.header.version,
            step=step,
            ids=list(update.results),
            batch=pack_batch(batch),
            manifest=update.manifest,
            results=update.result_maps(),
            rejected=update.rejected,
            h=replay.plain_hyperparameters(h),
            facts=replay.facts(self.weights.state.device, self.weights.rank_count),
            format=UPDATE_FORMAT if parts == 1 else DIVIDED_FORMAT,
            parts=parts,
        )
        self.journal.append(record)
        point("journaled")

    def void(self, version: int) -> None:
        """`version` was journaled and will not be applied. Never raises: the next record of that version says it too,
        and so does the header at the next start."""
        try:
            self.journal.void(version)
        except JournalError as error:
            log.warning(error)

    def after(self, version: int, manifest: dict[str, Any]) -> None:
        """`version` is live: add the weights' digest to `manifest`, and note it. What a crash loses of this are only
        measurements."""
        if (digest := self.rebuilder.digest()) is not None:
            manifest["digest"] = digest
        try:
            self.journal.append(Measured(version, manifest), durable=False)
        except JournalError as error:  # the version is in the weights: it must be committed whatever happens here
            log.warning(error)

    def adopt(self, version: int, lineage: str, known: Trained, parent: int | None = None) -> None:
        """The weights enter the journal as they are. parent: the version they are equal to; where that is not known,
        `known` must be everybody who was trained, or dropped, up to here."""
        manifest = {"kind": LineageRecord.kind, "previous_version": (self.history.latest() or (0, ""))[0]}
        self.journal.append(LineageRecord(version, lineage, parent, known.ledger, manifest, sorted(known.dropped)))

    def close(self) -> None:
        """Let go of the journal's file."""
        self.journal.close()
