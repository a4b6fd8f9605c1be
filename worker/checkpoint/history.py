"""What there is on disk of the versions: the journal and the checkpoints, read together.

Must not know: Redis.
Invariant: an id that was ever trained, or dropped, is known here for ever, whatever is pruned.
"""

from worker.checkpoint import ancestry
from worker.checkpoint.journal import Entry, Journal
from worker.checkpoint.records import LineageRecord
from worker.checkpoint.snapshots import SnapshotError, Snapshots, Trained


class History:
    """Of the versions in `journal` (open) and `snapshots`."""

    def __init__(self, journal: Journal, snapshots: Snapshots) -> None:
        self.journal, self.snapshots = journal, snapshots

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
                continue  # reported when it is needed
        return max(found, default=None)

    def ancestry(self, version: int) -> list[Entry]:
        """What led to `version`, itself included, oldest first, as far back as the journal goes."""
        return ancestry.ancestry(self.journal.entries, version)

    def contained(self, version: int) -> set[str]:
        """Ids that the journal knows to be in the weights of `version`."""
        return ancestry.contained(self.journal.entries, version)

    def dropped(self) -> dict[str, int]:
        """Everybody who was ever dropped, id -> the version that did it. Raises `SnapshotError`."""
        latest = self.latest()
        return self.trained(latest[0]).dropped if latest else {}

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
            self._check_whole(base, version, problem)
            for entry in self.entries(base, version):
                self._add(entry, found)
            return found
        raise AssertionError("version 0 is always there")

    def _check_whole(self, base: int, version: int, problem: str) -> None:
        roots = [e.version for e in self.entries(0, version) if e.kind == LineageRecord.kind and e.parent is None]
        first = max([base, *roots])
        if missing := set(range(first + 1, version + 1)) - self.journal.entries.keys():
            raise SnapshotError(
                f"the transcripts of version {min(missing)} are no longer known: neither a sound checkpoint nor the"
                f" journal has it{problem}"
            )

    def _add(self, entry: Entry, found: Trained) -> None:
        if entry.kind == LineageRecord.kind:
            record = self.journal.read(entry.version)
            assert isinstance(record, LineageRecord)
            found.ledger.update(record.imported)
        found.ledger.update(dict.fromkeys(entry.ids, entry.version))
        found.ledger.update(dict.fromkeys(entry.manifest.get("retaken", []), entry.version))
        found.dropped.update(dict.fromkeys(entry.dropped, entry.version))
        for id in entry.manifest.get("requeued", []):
            found.ledger.pop(id, None)
