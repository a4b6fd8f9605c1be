"""What the journal holds: one dataclass for each kind of record, and the plain maps that they are on disk.

    UpdateRecord    a batch that becomes a version      RollbackRecord  a version made again from an older one
    LineageRecord   weights taken over as they are      Measured        what was measured of an applied version
    Voided          a version that was never applied    Segment         first in each file

Must not know: torch, Redis.
Invariants: `parse(record.plain())` is the record; a field that an older Tandem did not write has its old meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from worker.checkpoint.record_file import JournalError

FILE_FORMAT = 1
"""Of a file: how its records lie in it. In the first record of each."""
CHECKPOINT_FORMAT = 1
"""Of a checkpoint: which files it has, and what is in them. In its meta.msgpack, a record of kind `CHECKPOINT`."""
CHECKPOINT = "checkpoint"
UPDATE_FORMAT = 4
"""Of an update's record: by which rules its batch is trained again (`worker.trainer.weighting`). A record that does not
say has format 1."""
DIVIDED_FORMAT = 5
"""Of a record whose batch was divided among replicas: as 4, with `parts`. An older Tandem would add up in another
order, so it must not read it."""

Plain = dict[str, Any]


class _Record:
    """kind: what the plain map says it is."""

    kind: ClassVar[str]

    def plain(self) -> Plain:
        """The map that goes to the disk; shallow: what it holds is shared with the record."""
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class UpdateRecord(_Record):
    """One micro-batch, whole: enough to train it again and get the same weights."""

    kind: ClassVar[str] = "update"
    version: int
    lineage: str
    parent: int
    """The version whose weights it was trained on."""
    step: int
    """Steps the optimizer had taken before it."""
    ids: list[str]
    """Jobs trained for the first time; what was rehearsed is in `batch` alone."""
    batch: list[Plain] | None
    """As `batch_codec.pack_batch` makes it, in order. None: its transcripts have expired."""
    manifest: Plain
    """As planned, before the version was applied."""
    results: dict[str, Plain] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    h: Plain = field(default_factory=dict)
    """All hyper-parameters."""
    facts: Plain = field(default_factory=dict)
    """torch, threads, machine: what a bitwise repetition needs."""
    format: int = 1
    parts: int = 1
    """Among how many replicas the batch was divided: it decides the order of sums."""
    time: float = 0.0


@dataclass(frozen=True)
class RollbackRecord(_Record):
    """`parent` made again, as a new version."""

    kind: ClassVar[str] = "rollback"
    version: int
    lineage: str
    parent: int
    dropped: list[str]
    """Ids that this rollback dropped, for ever."""
    manifest: Plain
    without: list[str] = field(default_factory=list)
    """All ids that were left out when it was made: `dropped`, and whoever was dropped before and is in `parent`."""
    ids: list[str] = field(default_factory=list)
    time: float = 0.0


@dataclass(frozen=True)
class LineageRecord(_Record):
    """Weights that enter the journal as they are."""

    kind: ClassVar[str] = "lineage"
    version: int
    lineage: str
    parent: int | None
    """The version that they are equal to, or None: they are in a checkpoint alone."""
    imported: dict[str, int]
    """The ledger up to here, id -> version."""
    manifest: Plain
    dropped: list[str] = field(default_factory=list)
    """Who had been dropped by then."""
    time: float = 0.0


@dataclass(frozen=True)
class Measured(_Record):
    """The manifest of `version`, complete, once it is live."""

    kind: ClassVar[str] = "done"
    version: int
    manifest: Plain
    time: float = 0.0


@dataclass(frozen=True)
class Voided(_Record):
    """`version` was journaled and never applied."""

    kind: ClassVar[str] = "void"
    version: int
    time: float = 0.0


@dataclass(frozen=True)
class Segment(_Record):
    """The first record of a file. source: fingerprint of the model."""

    kind: ClassVar[str] = "segment"
    format: int
    source: str
    time: float = 0.0


VersionRecord = UpdateRecord | RollbackRecord | LineageRecord
Record = VersionRecord | Measured | Voided | Segment

_KINDS: dict[str, type[Any]] = {
    one.kind: one for one in (UpdateRecord, RollbackRecord, LineageRecord, Measured, Voided, Segment)
}


def parse(plain: Mapping[str, Any]) -> Record:
    """The record that a plain map is. Raises ValueError, KeyError or TypeError for what is none of ours."""
    made = _KINDS[plain["kind"]]
    names = {f.name for f in fields(made)}
    record: Record = made(**{name: value for name, value in plain.items() if name in names})
    if isinstance(record, UpdateRecord | RollbackRecord | LineageRecord):
        _check_version(record)
    return record


def check_format(plain: Mapping[str, Any], path: Path) -> None:
    """Refuse a record `plain` of `path` that a later Tandem wrote in a format that this one does not know.

    Raises `JournalError`. What says no format is of the first one.
    """
    known = {Segment.kind: FILE_FORMAT, CHECKPOINT: CHECKPOINT_FORMAT, UpdateRecord.kind: DIVIDED_FORMAT}
    newest = known.get(str(plain.get("kind")))
    found = plain.get("format", 1)
    if newest is None or (type(found) is int and 1 <= found <= newest):
        return
    upto = "format 1" if newest == 1 else f"formats 1 to {newest}"
    raise JournalError(
        f"{path} has format {found!s:.20}, and this Tandem reads {upto}: use the Tandem that wrote it, or name another"
        " directory with --state-dir, in which the history begins anew"
    )


def _check_version(record: VersionRecord) -> None:
    parent = record.parent
    if type(record.version) is not int or not isinstance(record.lineage, str):
        raise ValueError("version or lineage")
    if not (parent is None or (type(parent) is int and 0 <= parent < record.version)):
        raise ValueError("parent")
    if not isinstance(record.manifest, dict) or not isinstance(record.time, int | float):
        raise TypeError("manifest or time")
