"""The journal: how each version of the weights came to be, on disk before the weights change.

Kinds of records: "update" (a batch: ids, transcripts, tokens, order, seed, hyper-parameters, optimizer step),
"rollback" (a version made from an older one), "lineage" (weights taken over as they are), "done" (a version's
measurements), "void" (a version that was journaled and never applied), "segment" (first in each file).

Must not know: torch, Redis, how a version is rebuilt.
Invariants: append-only, but for texts that expire; a version's record is on disk when `append` returns; a failed write
leaves no part of itself; versions are never used twice, except after a "void".
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.checkpoint import record_file, state_dir
from worker.checkpoint.record_file import JournalError

FORMAT = 1
SEGMENT_BYTES = 64 * 2**20
"""A file grows to about this before the next is begun."""
VERSION_KINDS = ("update", "rollback", "lineage")

__all__ = ["Entry", "Journal", "JournalError"]


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
    manifest: dict[str, Any] = field(default_factory=dict)
    """As planned, until "done" tells what was measured."""
    expired: bool = False
    """Its transcripts and tokens are gone, so that it cannot be replayed."""

    @property
    def digest(self) -> str | None:
        return self.manifest.get("digest")


class Journal:
    """The journal in `folder`, open for one writer. `source` says of which model the weights are."""

    def __init__(self, folder: Path, source: str) -> None:
        """Read and check everything. Raises `JournalError`; `notices` tells what was repaired."""
        self.folder, self.source = folder, source
        self.entries: dict[int, Entry] = {}
        self.notices: list[str] = []
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

    def append(self, record: dict[str, Any], *, durable: bool = True) -> None:
        """Write one record; on disk when this returns, if `durable`. Raises `JournalError` with nothing written."""
        record = {"time": time.time()} | record
        offset = self._write(record, durable)
        self._index(record, self._path, offset)
        if self._size >= SEGMENT_BYTES:
            self.rotate()

    def void(self, version: int) -> None:
        """Say that `version` was journaled and never applied."""
        self.append({"kind": "void", "version": version})

    def rotate(self) -> None:
        """Begin a new file, so that the ones before can go once checkpoints cover them."""
        try:
            os.fsync(self._file.fileno())  # a closed file has no tail that could be torn
        except OSError as error:
            raise self._refusal(error) from None
        self._file.close()
        self._begin_file(int(self._path.stem) + 1)

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
        """Remove transcripts and tokens of versions up to `covered` that are older than `before`; returns how many.

        Only closed files are rewritten, each whole under a temporary name.
        """
        count = 0
        for path in self._files()[:-1]:
            old = [entry for entry in self.entries.values() if entry.path == path and _may_expire(entry)]
            old = [entry for entry in old if entry.version <= covered and entry.time < before]
            if not old:
                continue
            offsets = {entry.offset for entry in old}
            records = record_file.scan(path, last=False).records
            kept = [record | {"batch": None} if at in offsets else record for at, record in records]
            state_dir.replace(path, b"".join(record_file.pack(record) for record in kept))
            count += len(old)
        if count:  # offsets have moved
            self.entries.clear()
            for path in self._files():
                self._load(path, last=False)
        return count

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, version: int) -> dict[str, Any]:
        """The whole record of `version`. Raises `JournalError`; KeyError if there is none."""
        entry = self.entries[version]
        return record_file.read(entry.path, entry.offset)

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
            try:
                self._index(record, path, offset)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise JournalError(
                    f"journal {path}, byte {offset}: a record of kind {record['kind'][:20]!r} that is not one of ours"
                    f" ({type(error).__name__})"
                ) from None
        if found.torn:
            with path.open("r+b") as file:
                file.truncate(found.end)
                os.fsync(file.fileno())
            self.notices.append(
                f"journal {path.name}: cut {found.torn} bytes that a crash left of an unfinished record"
            )

    def _begin_file(self, number: int) -> None:
        path = self.folder / f"{number:08d}.journal"
        first = {"kind": "segment", "format": FORMAT, "source": self.source, "time": time.time()}
        try:
            state_dir.replace(path, record_file.pack(first))
        except OSError as error:
            raise self._refusal(error) from None
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refusal(error) from None
        self._path, self._size = path, path.stat().st_size

    def _write(self, record: dict[str, Any], durable: bool) -> int:
        data, offset = memoryview(record_file.pack(record)), self._size
        try:
            while data:
                data = data[self._file.write(data) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), offset)
            raise self._refusal(error) from None
        self._size = os.fstat(self._file.fileno()).st_size
        return offset

    def _refusal(self, error: OSError) -> JournalError:
        return JournalError(
            f"the journal in {self.folder} cannot be written ({error.strerror}): make room or make it writable, then"
            " start the worker again; nothing that is not journaled is trained"
        )

    # -- meaning --------------------------------------------------------------------------------------------------

    def _index(self, record: dict[str, Any], path: Path, offset: int) -> None:
        kind = record["kind"]
        if kind in VERSION_KINDS:
            self.entries[record["version"]] = _entry(record, path, offset)
        elif kind == "void":
            self.entries.pop(record["version"], None)
        elif kind == "done":
            if record["version"] in self.entries:
                self.entries[record["version"]].manifest = dict(record["manifest"])
        elif kind == "segment":
            self._check_segment(record, path)
        else:
            raise ValueError(kind)

    def _check_segment(self, record: dict[str, Any], path: Path) -> None:
        if record["format"] != FORMAT:
            raise JournalError(f"journal {path} has format {record['format']}, this Tandem reads {FORMAT}")
        if record["source"] != self.source:
            raise JournalError(
                f"journal {path} is of another model than the one being served (its files differ): serve the model that"
                " it began with, or name another directory with --state-dir"
            )


def _entry(record: dict[str, Any], path: Path, offset: int) -> Entry:
    version, parent, lineage = record["version"], record["parent"], record["lineage"]
    if type(version) is not int or not isinstance(lineage, str) or not (parent is None or 0 <= parent < version):
        raise ValueError("version, parent or lineage")
    manifest = dict(record.get("manifest", {}))
    ids, dropped = list(record.get("ids", [])), list(record.get("dropped", []))
    expired = record["kind"] == "update" and record["batch"] is None
    return Entry(
        version, record["kind"], lineage, parent, float(record["time"]), path, offset, ids, dropped, manifest, expired
    )


def _may_expire(entry: Entry) -> bool:
    return entry.kind == "update" and not entry.expired
