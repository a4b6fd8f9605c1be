"""Writes checkpoints of the live weights when they are due, and lets go of what they make unneeded.

Must not know: Redis.
Invariants: a checkpoint is written between two updates, by the only writer of the weights; at no time does a version of
the history depend on a file that has been deleted.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from producer.errors import TandemError
from worker.checkpoint.history import History
from worker.checkpoint.pruning import kept
from worker.checkpoint.snapshots import SnapshotError
from worker.config.retention import Policy
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.header import CLEAN
from worker.utils.fault_injection import point


@dataclass(frozen=True)
class Written:
    """A checkpoint of `version` lies at `path`."""

    version: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class NotWritten:
    """There is no checkpoint of `version`, for `reason`; the journal still has everything."""

    version: int
    reason: str


class CheckpointWriter:
    """Of `weights`, into `history`'s snapshots, as `policy` says. policy None: nothing is ever pruned."""

    def __init__(self, history: History, weights: AttachedWeights, policy: Policy | None) -> None:
        self.history, self.weights = history, weights
        self.snapshots, self.journal = history.snapshots, history.journal
        self.policy, self._prunes = policy or Policy(), policy is not None
        self._since = time.monotonic()
        self._tried = 0

    def write_if_due(self) -> Written | NotWritten | None:
        """One, when the policy says so; None when it does not."""
        return self.try_write() if self.is_due() else None

    def is_due(self) -> bool:
        """Whether the policy asks for one now."""
        version = self.weights.header.version
        done = max([0, self._tried, *self.snapshots.versions()])
        minutes = (time.monotonic() - self._since) / 60
        return version > done and (version - done >= self.policy.every or minutes >= self.policy.minutes)

    def try_write(self) -> Written | NotWritten | None:
        """`write`, or why there is none. It is tried again when the next one is due, not before every batch."""
        self._tried, self._since = self.weights.header.version, time.monotonic()
        try:
            return self.write()
        except TandemError as error:
            return NotWritten(self._tried, str(error))

    def write(self) -> Written | None:
        """Write a checkpoint of the weights as they are, and let go of what it makes unneeded; None if there is one,
        or if there can be none (weights that came from no files: reported once, at the start).

        Raises `SnapshotError`, `JournalError`.
        """
        header = self.weights.header.fields()
        version, lineage = int(header["version"]), str(header["lineage"])
        if header["state"] != CLEAN or version == 0 or version in self.snapshots.versions():
            return None
        if not self.snapshots.has_layout:
            return None
        trained = self.history.trained(version)
        seconds = self.snapshots.write(version, lineage, self.weights.tensors, self.weights.state, trained)
        self._since = time.monotonic()
        point("checkpointed")
        self.journal.rotate()
        if self._prunes:
            try:
                self._let_go()
            except OSError as error:
                raise SnapshotError(
                    f"the checkpoint of version {version} is written, but files that are no longer needed in"
                    f" {self.snapshots.folder.parent} could not be deleted ({error.strerror}): the next one tries again"
                ) from error
        return Written(version, self.snapshots.path(version), seconds)

    def _let_go(self) -> None:
        """Old checkpoints, the journal before the oldest that stays, and texts whose time has come."""
        versions = self.snapshots.versions()
        stays = kept(versions, keep=self.policy.keep, history=self.policy.history)
        self.snapshots.prune(set(stays.checkpoints))
        self.journal.prune(stays.base)
        if self.policy.transcripts_hours is not None:
            self.journal.expire(versions[-1], time.time() - 3600 * self.policy.transcripts_hours)
