"""Keeps what the weights have learnt: journals versions before they are applied, writes checkpoints, rebuilds versions.

Knows the journal, the checkpoints and the live weights. Must not know: Redis, sockets, how jobs are settled.
Invariants: a version's record is on disk before the header says APPLYING; a rebuild reads and checks everything it
needs before the first byte of the weights changes, and the header says APPLYING until it is complete; at no time does
the newest version depend on a file that has been deleted.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from producer.errors import TandemError
from worker.checkpoint import replay
from worker.checkpoint.journal import Entry, Journal, JournalError
from worker.checkpoint.replay import Make, Ready, RoomOf
from worker.checkpoint.snapshots import SnapshotError, Snapshots, Trained
from worker.checkpoint.state_dir import StateDir
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import Update
from worker.config.retention import Policy
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.header import CLEAN
from worker.utils.fault_injection import point

log = logging.getLogger("tandem")


class CannotRebuild(TandemError):
    """A version cannot be made again from what the state directory holds."""


@dataclass
class Plan:
    """How a version is made: from which checkpoint (0: the source model), through which batches, without whom."""

    version: int
    base: int
    steps: list[tuple[dict[str, Any], frozenset[str]]]
    said: list[str] = field(default_factory=list)


class Keeper:
    """Of the weights of one server; `state` is open. `make_trainer` makes a trainer on them, `room` says what it takes
    at once."""

    def __init__(self, state: StateDir, weights: AttachedWeights, make: Make, room: RoomOf, policy: Policy) -> None:
        self.weights, self.make_trainer, self.room, self.policy = weights, make, room, policy
        self.snapshots = Snapshots(state.checkpoints, weights.model_path)
        self.journal = Journal(state.journal, self.snapshots.fingerprint)
        self.notices = [*self.journal.notices, *self.snapshots.notices]
        self.device = weights.state.device
        self._since = time.monotonic()
        self._tried = 0

    # -- an update, as it goes on ---------------------------------------------------------------------------------

    def before(self, update: Update, batch: Sequence[Ready], h: Hyperparameters, step: int) -> None:
        """Journal `update`, about to be applied as the optimizer's step after `step`. batch: all that its gradients
        come from, in order. Raises `JournalError`."""
        record = {
            "kind": "update",
            "version": update.version,
            "lineage": update.lineage,
            "parent": self.weights.header.version,
            "step": step,
            "ids": list(update.results),
            "batch": replay.pack_batch(batch),
            "rejected": update.rejected,
            "manifest": update.manifest,
            "results": update.results,
            "h": replay.plain_hyperparameters(h),
            "facts": replay.facts(self.device),
        }
        self.journal.append(record)
        point("journaled")

    def void(self, version: int) -> None:
        """`version` was journaled and will not be applied. Never raises: the next record of that version says it too,
        and so does the header at the next start."""
        try:
            self.journal.void(version)
        except JournalError as error:
            log.warning(error)

    def after(self, update: Update) -> None:
        """`update` is live: note what was measured."""
        assert update.version is not None
        self.measured(update.version, update.manifest)

    def measured(self, version: int, manifest: dict[str, Any]) -> None:
        """Add the weights' digest to `manifest` and note it; what a crash loses of this are only measurements."""
        if self.device.type == "cpu":
            manifest["digest"] = replay.digest(self.weights.tensors)
        try:
            done = {"kind": "done", "version": version, "manifest": manifest}
            self.journal.append(done, durable=False)
        except JournalError as error:  # the version is in the weights: it must be committed whatever happens here
            log.warning(error)

    def adopt(self, version: int, lineage: str, imported: dict[str, int], parent: int | None = None) -> None:
        """The weights enter the journal as they are. parent: the version they are equal to; where that is not known,
        `imported` must be the whole ledger up to here, id -> version."""
        manifest = {"kind": "lineage", "previous_version": (self.latest() or (0, ""))[0]}
        record = {"version": version, "lineage": lineage, "parent": parent, "manifest": manifest}
        self.journal.append({"kind": "lineage", **record, "imported": imported})

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint_if_due(self) -> str | None:
        """Write one when the policy says so; what was done or what went wrong, for the log."""
        version = self.weights.header.version
        done = max([0, self._tried, *self.snapshots.versions()])
        minutes = (time.monotonic() - self._since) / 60
        if version <= done or (version - done < self.policy.every and minutes < self.policy.minutes):
            return None
        return self.try_checkpoint()

    def try_checkpoint(self) -> str | None:
        """`checkpoint`, or why there is none, for the log: the journal still has everything."""
        self._tried, self._since = self.weights.header.version, time.monotonic()  # not before every batch again
        try:
            return self.checkpoint()
        except TandemError as error:
            return str(error)

    def checkpoint(self) -> str | None:
        """Write a checkpoint of the weights as they are, and let go of what it makes unneeded; None if there is one,
        or if there can be none (weights that came from no files: said once, at the start).

        For the writer of the weights alone, between updates. Raises `SnapshotError`, `JournalError`.
        """
        header = self.weights.header.fields()
        version, lineage = int(header["version"]), str(header["lineage"])
        if header["state"] != CLEAN or version == 0 or version in self.snapshots.versions():
            return None
        if not self.snapshots.has_layout:
            return None
        trained = self.trained(version)
        seconds = self.snapshots.write(version, lineage, self.weights.tensors, self.weights.state, trained)
        self._since = time.monotonic()
        point("checkpointed")
        self.journal.rotate()
        self._let_go()
        return f"checkpoint of version {version} written in {seconds:.1f} s: {self.snapshots.path(version)}"

    def _let_go(self) -> None:
        """Old checkpoints, the journal before the oldest that stays, and texts whose time has come."""
        versions = self.snapshots.versions()
        newest = versions[-self.policy.keep :]
        # The history is rebuilt from the last checkpoint before it, or from the source model.
        base = max([v for v in versions if v <= min(newest[0], newest[-1] - self.policy.history)], default=0)
        self.snapshots.prune({base, *newest})
        self.journal.prune(base)
        if self.policy.transcripts_hours is not None:
            self.journal.expire(newest[-1], time.time() - 3600 * self.policy.transcripts_hours)

    def trained(self, version: int) -> Trained:
        """Every id trained in a version up to `version`, also in versions that were rolled back, and every dropped id.

        Raises `SnapshotError` when a checkpoint that it takes is damaged.
        """
        problem = ""
        for base in [*reversed([v for v in self.snapshots.versions() if v <= version]), 0]:
            try:
                found = self.snapshots.trained(base) if base else Trained({}, {})
            except SnapshotError as error:
                problem = f" ({error})"
                continue
            whole = [e.version for e in self.entries(0, version) if e.kind == "lineage" and e.parent is None]
            first = max([base, *whole])
            if missing := set(range(first + 1, version + 1)) - self.journal.entries.keys():
                raise SnapshotError(
                    f"nobody knows any more who was trained in version {min(missing)}: neither a sound checkpoint nor"
                    f" the journal has it{problem}"
                )
            for entry in self.entries(base, version):
                if entry.kind == "lineage":
                    found.ledger.update(self.journal.read(entry.version)["imported"])
                found.ledger.update(dict.fromkeys(entry.ids, entry.version))
                found.dropped.update(dict.fromkeys(entry.dropped, entry.version))
                for id in entry.manifest.get("requeued", []):
                    found.ledger.pop(id, None)
            return found
        raise AssertionError("version 0 is always there")

    # -- what there is --------------------------------------------------------------------------------------------

    def entries(self, after: int, upto: int) -> list[Entry]:
        """The journal's versions in (after, upto], oldest first."""
        return [self.journal.entries[v] for v in sorted(self.journal.entries) if after < v <= upto]

    def latest(self) -> tuple[int, str] | None:
        """(version, lineage) of the newest version that is journaled or in a checkpoint, or None."""
        last = self.journal.last
        found = [(last.version, last.lineage)] if last else []
        for version in reversed(self.snapshots.versions()):
            try:
                found.append((version, self.snapshots.describe(version).lineage))
                break
            except SnapshotError:
                continue  # said when it is needed
        return max(found, default=None)

    # -- making a version again -----------------------------------------------------------------------------------

    def plan(self, version: int, dropped: frozenset[str] = frozenset()) -> Plan:
        """How to make `version` without the ids in `dropped`, everything read and checked. Raises `CannotRebuild`."""
        said: list[str] = []

        def usable(candidate: int, without: frozenset[str]) -> bool:
            if candidate == 0:
                return True
            if candidate not in self.snapshots.versions():
                return False
            try:
                self.snapshots.check(candidate)
                return without.isdisjoint(self.snapshots.trained(candidate).ledger)
            except SnapshotError as error:
                said.append(f"{error}; an older one is taken, with more of the journal")
                return False

        base, path = trace(self.journal.entries, version, dropped, usable)
        if base == 0 and self.weights.server_info.get("load_format") == "dummy":
            raise CannotRebuild(
                f"version {version} cannot be made: the server began with random weights (--load-format dummy), which"
                " nobody can restore. Where the weights are torn or lost, restart the server (tandem serve ...), then"
                " run `tandem worker --new-lineage`"
            )
        steps = [(self.journal.read(entry.version), without) for entry, without in path]
        try:
            replay.check_fits(steps, self.room)
        except replay.ReplayError as error:
            raise CannotRebuild(str(error)) from error
        return Plan(version, base, steps, said)

    def rebuild(self, plan: Plan, lineage: str, version: int) -> list[str]:
        """Make the weights what `plan` says and the header `lineage`, `version`; what is to be told of it.

        The server must be paused. Whatever is raised leaves the header APPLYING: the next start tries again.
        """
        header, started = self.weights.header, time.monotonic()
        if header.state == CLEAN:
            header.begin()
        point("restoring")
        self.snapshots.restore(plan.base, self.weights.tensors, self.weights.state)
        said = replay.replay(plan.steps, self.make_trainer, self.device)
        point("restored")
        header.adopt(lineage, version)
        source = f"the checkpoint of version {plan.base}" if plan.base else "the source model"
        count = len(plan.steps)
        batches = f" and {count} journaled batch{'' if count == 1 else 'es'}" if count else ""
        made = f"version {plan.version} was made from {source}{batches} in {time.monotonic() - started:.1f} s"
        return [*plan.said, made, *said]

    def compare(self, version: int) -> str | None:
        """Whether the weights as they are equal those that the journal saw at `version`; None if it did not look."""
        entry = self.journal.entries.get(version)
        if entry is None or entry.digest is None or self.device.type != "cpu":
            return None
        now = replay.digest(self.weights.tensors)
        same = now == entry.digest
        return f"bit for bit what they were (digest {now})" if same else f"not bit for bit ({now}, then {entry.digest})"

    def close(self) -> None:
        """Let go of the journal's file."""
        self.journal.close()


def trace(
    entries: dict[int, Entry], version: int, dropped: frozenset[str], usable: Callable[[int, frozenset[str]], bool]
) -> tuple[int, list[tuple[Entry, frozenset[str]]]]:
    """From which usable version, through which updates, oldest first, `version` comes; each with whom to leave out.

    usable(version, without): weights of that version are at hand and contain nobody of `without`.
    """
    path: list[tuple[Entry, frozenset[str]]] = []
    at = version
    while not usable(at, dropped):
        entry = entries.get(at)
        if entry is None or entry.parent is None:
            why = "its journal was pruned" if entry is None else "its weights came from elsewhere"
            ask = f" without {', '.join(sorted(dropped))}" if dropped else ""
            raise CannotRebuild(
                f"version {version}{ask} cannot be made: it goes back to version {at}, which has no usable checkpoint,"
                f" and {why}"
            )
        if entry.kind == "rollback":
            dropped |= frozenset(entry.dropped)
        elif entry.kind == "update":
            path.append((entry, dropped))
        at = entry.parent
    return at, path[::-1]
