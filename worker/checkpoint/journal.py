"""The journal: how each version of the weights came to be, on disk before the weights change.

Append-only files of records (records.py says which kinds). Must not know: torch, Redis.
Invariants: append-only, but for texts that expire; a version's record is on disk when `append` returns; a failed write
leaves no part of itself, and a failed rotation leaves the file that was open; versions are never used twice, except
after a `Voided`.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from worker.checkpoint import record_file, records, state_dir
from worker.checkpoint.record_file import JournalError
from worker.checkpoint.records import (
    LineageRecord,
    Measured,
    Record,
    RollbackRecord,
    Segment,
    UpdateRecord,
    VersionRecord,
    Voided,
)

log = logging.getLogger("tandem")

SEGMENT_BYTES = 64 * 2**20
"""A file grows to about this before the next is begun."""

__all__ = ["Entry", "Journal", "JournalError", "TornTail"]


@dataclass(frozen=True)
class TornTail:
    """`cut` bytes of an unfinished record, which a crash left at the end of the file `path`, were removed."""

    path: Path
    cut: int


@dataclass
class Entry:
    """What is kept in memory of a version's record; the rest is read from `path` at `offset` when it is needed."""

    version: int
    kind: str
    lineage: str
    parent: int | None
    """The version it was made from; None where that is not known (its weights are in a checkpoint alone)."""
    time: float
    path: Path
    offset: int
    ids: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Ids that this version dropped, for ever."""
    without: list[str] = field(default_factory=list)
    """All ids that were left out when it was made."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """As planned, until `Measured` has what was measured."""
    expired: bool = False
    """Its transcripts and tokens are gone, so that it cannot be replayed."""

    @property
    def digest(self) -> str | None:
        return self.manifest.get("digest")


class Journal:
    """The journal in `folder`, open for one writer. `source` says of which model the weights are."""

    def __init__(self, folder: Path, source: str) -> None:
        """Read and check everything. Raises `JournalError`; `notices` has what was repaired."""
        self.folder, self.source = folder, source
        self.entries: dict[int, Entry] = {}
        self.notices: list[TornTail] = []
        for leftover in folder.glob(".*.new"):
            leftover.unlink()
        files = self._files()
        for path in files:
            self._load(path, last=path == files[-1])
        if files:
            self._open(files[-1])
        else:
            self._begin_file(1)

    # -- writing --------------------------------------------------------------------------------------------------

    def append(self, record: Record, *, durable: bool = True) -> None:
        """Write one record; on disk when this returns, if `durable`. Raises `JournalError` with nothing written."""
        record = replace(record, time=record.time or time.time())
        offset = self._write(record_file.pack(record.plain()), durable)
        self._index(record, self._path, offset)
        if self._size >= SEGMENT_BYTES:
            try:
                self.rotate()
            except JournalError as error:  # the record is written: the next one says whether there is room
                log.warning("%s", error)

    def void(self, version: int) -> None:
        """Say that `version` was journaled and never applied."""
        self.append(Voided(version))

    def rotate(self) -> None:
        """Begin a new file, so that the ones before can go once checkpoints cover them.

        Raises `JournalError`; then the file that was open still is.
        """
        try:
            os.fsync(self._file.fileno())  # a closed file has no tail that could be torn
        except OSError as error:
            raise self._refusal(error) from None
        before = self._file
        self._begin_file(int(self._path.stem) + 1)
        before.close()

    def prune(self, floor: int) -> list[Path]:
        """Delete the closed files that hold no version after `floor`; returns them."""
        gone = []
        for path in self._files()[:-1]:
            versions = [entry.version for entry in self.entries.values() if entry.path == path]
            if all(version <= floor for version in versions):
                for version in versions:
                    del self.entries[version]
                path.unlink()
                gone.append(path)
            else:
                break  # never a gap
        state_dir.sync(self.folder)
        return gone

    def expire(self, covered: int, before: float) -> int:
        """Remove transcripts and tokens of versions up to `covered` that are older than `before`; returns how many."""
        old = [entry for entry in self.entries.values() if _may_expire(entry)]
        due = {(e.path, e.offset) for e in old if e.version <= covered and e.time < before}
        return self.rewrite(lambda path, at, record: record | {"batch": None} if (path, at) in due else record)

    def rewrite(self, change: Callable[[Path, int, dict[str, Any]], dict[str, Any]]) -> int:
        """Put what `change` makes of a record (of a file, at an offset) in its place; returns how many it changed.

        Only closed files are rewritten, each whole under a temporary name; a record that is not to change must come
        back as the very same object. Raises `JournalError`.
        """
        count = 0
        try:
            for path in self._files()[:-1]:
                found = record_file.scan(path, last=False).records
                kept = [change(path, at, record) for at, record in found]
                changed = sum(new is not record for new, (_, record) in zip(kept, found, strict=True))
                if changed:
                    state_dir.replace(path, b"".join(record_file.pack(record) for record in kept))
                    count += changed
        except OSError as error:
            raise self._refusal(error) from None
        finally:
            if count:  # offsets have moved
                self.entries.clear()
                for path in self._files():
                    self._load(path, last=False)
        return count

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, version: int) -> VersionRecord:
        """The whole record of `version`. Raises `JournalError`; KeyError if there is none."""
        entry = self.entries[version]
        record = records.parse(record_file.read(entry.path, entry.offset))
        assert isinstance(record, UpdateRecord | RollbackRecord | LineageRecord)
        return record

    @property
    def last(self) -> Entry | None:
        """The newest version, applied or not."""
        return self.entries[max(self.entries)] if self.entries else None

    # -- files ----------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.journal") if path.stem.isdigit())

    def _load(self, path: Path, *, last: bool) -> None:
        try:
            found = record_file.scan(path, last=last)
        except OSError as error:
            raise JournalError(f"journal {path} cannot be read ({error.strerror})") from None
        for offset, record in found.records:
            records.check_format(record, path)
            try:
                self._index(records.parse(record), path, offset)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise JournalError(
                    f"journal {path}, byte {offset}: a record of kind {record['kind'][:20]!r} that is not one of ours"
                    f" ({type(error).__name__})"
                ) from None
        if found.torn:
            with path.open("r+b") as file:
                file.truncate(found.end)
                os.fsync(file.fileno())
            self.notices.append(TornTail(path, found.torn))

    def _begin_file(self, number: int) -> None:
        """Make a file and write to it from now on. Raises `JournalError`, with nothing of it left."""
        path = self.folder / f"{number:08d}.journal"
        first = Segment(records.FILE_FORMAT, self.source, time.time())
        try:
            state_dir.replace(path, record_file.pack(first.plain()))
            self._open(path)
        except (OSError, JournalError) as error:
            for leftover in (path, state_dir.temporary(path)):
                with contextlib.suppress(OSError):
                    leftover.unlink()
            raise self._refusal(error) if isinstance(error, OSError) else error from None

    def _open(self, path: Path) -> None:
        try:
            file, size = path.open("ab", buffering=0), path.stat().st_size
        except OSError as error:
            raise self._refusal(error) from None
        self._file, self._path, self._size = file, path, size

    def _write(self, record: bytes, durable: bool) -> int:
        data, offset = memoryview(record), self._size
        try:
            if os.fstat(self._file.fileno()).st_size != offset:  # a part of a record that could not be cut off then
                os.ftruncate(self._file.fileno(), offset)
            while data:
                data = data[self._file.write(data) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), offset)
            raise self._refusal(error) from None
        self._size = offset + len(record)
        return offset

    def _refusal(self, error: OSError) -> JournalError:
        return JournalError(
            f"the journal in {self.folder} cannot be written ({error.strerror}): make room or make it writable, then"
            " start the worker again; nothing that is not journaled is trained"
        )

    # -- meaning --------------------------------------------------------------------------------------------------

    def _index(self, record: Record, path: Path, offset: int) -> None:
        if isinstance(record, UpdateRecord | RollbackRecord | LineageRecord):
            self.entries[record.version] = _entry(record, path, offset)
        elif isinstance(record, Voided):
            self.entries.pop(record.version, None)
        elif isinstance(record, Measured):
            if record.version in self.entries:
                self.entries[record.version].manifest = dict(record.manifest)
        else:
            self._check_segment(record, path)

    def _check_segment(self, record: Segment, path: Path) -> None:
        if record.source != self.source:
            raise JournalError(
                f"journal {path} is of another model than the one being served (its files differ): serve the model that"
                " it began with, or name another directory with --state-dir"
            )


def _entry(record: VersionRecord, path: Path, offset: int) -> Entry:
    entry = Entry(record.version, record.kind, record.lineage, record.parent, float(record.time), path, offset)
    entry.manifest = dict(record.manifest)
    if isinstance(record, UpdateRecord):
        entry.ids, entry.expired = list(record.ids), record.batch is None
    else:
        entry.dropped = list(record.dropped)
        entry.without = sorted({*record.dropped, *(record.without if isinstance(record, RollbackRecord) else ())})
    return entry


def _may_expire(entry: Entry) -> bool:
    return entry.kind == UpdateRecord.kind and not entry.expired
