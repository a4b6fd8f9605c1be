"""The worker's state directory: whether it can be used, in which formats its files are, whether checkpoints have their
files, and what room there is.

Must not know: torch, vLLM, Redis. Invariants: only reads, and takes no lock, so that it works beside a worker; of a
journal it reads the first record of each file, and the last file whole; of a checkpoint what it says of itself.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.errors import TandemError
from worker.checkpoint import record_file, records
from worker.checkpoint.file_digests import fingerprint
from worker.checkpoint.journal import SEGMENT_BYTES
from worker.checkpoint.state_dir import default_state_dir, free_bytes
from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked, warning
from worker.operations.doctor.server_view import ServerView

SPARE = 1.05
"""Of a checkpoint's size: what a checkpoint wants to be free (`Snapshots`)."""
EXTRA, META = "tandem", "meta.msgpack"
"""Of a checkpoint: its folder with what is Tandem's, and the file there that says what the checkpoint is."""
SHOWN = 3
"""How many missing files a finding names."""
BATCH_BYTES = 16 * 2**20
"""More than the journal's record of a large batch takes."""


def state_dir_of(given: Path | None, server: ServerView) -> Path | None:
    """As the worker finds it: given, else $TANDEM_STATE_DIR, else by the server's model; None where none says it."""
    configured = os.environ.get("TANDEM_STATE_DIR")
    if given or configured:
        return given or Path(str(configured))
    return default_state_dir(server.model) if server.model else None


def check_state(folder: Path | None) -> Finding:
    """Whether all of it can be read, and is ours alone."""
    name = "state directory"
    if folder is None:
        return unchecked(name, Fact.STATE_UNKNOWN)
    try:
        if not folder.exists():
            above = next(path for path in folder.absolute().parents if path.exists())
            return _unwritable(above) or ok(name, Fact.STATE_NEW, path=str(folder))
        for path in _to_read(folder):
            with path.open("rb"):
                pass
        folders = [path for path in (folder, folder / "journal", folder / "checkpoints") if path.exists()]
        infos = {path: path.stat() for path in folders}
    except OSError as error:
        where = str(error.filename or folder)
        return fault(name, Fact.STATE_UNREADABLE, path=where, reason=error.strerror, uid=os.getuid())
    for path, info in infos.items():
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            return fault(name, Fact.STATE_FOREIGN, path=str(path), owner=info.st_uid, uid=os.getuid())
        if found := _unwritable(path):
            return found
        if info.st_mode & 0o077:
            return warning(name, Fact.STATE_OPEN, path=str(path), mode=f"{info.st_mode & 0o777:04o}")
    return ok(name, Fact.STATE, path=str(folder))


def _unwritable(path: Path) -> Finding | None:
    """Of a folder that we cannot write to; asked of the system, which knows of mounts too."""
    if os.access(path, os.W_OK | os.X_OK):
        return None
    return fault("state directory", Fact.STATE_UNWRITABLE, path=str(path), uid=os.getuid())


def check_formats(folder: Path | None, model: Path | None) -> Finding:
    """Whether this Tandem reads the journal and the checkpoints in `folder`, and they are of `model`."""
    if folder is None or not os.access(folder, os.R_OK | os.X_OK):
        return unchecked("formats", Fact.STATE_UNKNOWN if folder is None else Fact.FORMATS_UNREAD, path=str(folder))
    files = set()
    try:
        source = fingerprint(model) if model is not None and model.is_dir() else None
        for path, plain in _telling_records(folder):
            files.add(path)
            records.check_format(plain, path.parents[1] if path.name == META else path)
            if None not in (source, said := plain.get("source")) and said != source:
                return fault("formats", Fact.OTHER_MODEL, path=str(path), model=str(model))
    except (TandemError, OSError) as error:
        return fault("formats", Fact.FORMAT_REFUSED, said=str(error))
    return ok("formats", Fact.FORMATS, files=len(files))


def check_checkpoints(folder: Path | None) -> Finding:
    """Whether every checkpoint has the files that it names; what is in them is not compared."""
    name = "checkpoints"
    if folder is None or not os.access(folder, os.R_OK | os.X_OK):
        return unchecked(name, Fact.STATE_UNKNOWN if folder is None else Fact.FORMATS_UNREAD, path=str(folder))
    found = _checkpoints(folder)
    for path in found:
        try:
            gone = _gone(path)
        except (TandemError, OSError) as error:
            return fault(name, Fact.FORMAT_REFUSED, said=str(error))
        if gone and path.exists():  # not one that a worker deletes just now
            return fault(name, Fact.CHECKPOINT_FILES_GONE, path=str(path), count=len(gone), first=gone[:SHOWN])
    return ok(name, Fact.CHECKPOINTS, count=len(found))


def _gone(checkpoint: Path) -> list[str]:
    """Files that `checkpoint` names and has not. Raises `JournalError`, OSError."""
    meta = checkpoint / EXTRA / META
    if not meta.exists():
        return [f"{EXTRA}/{META}"]
    named = record_file.read(meta, 0).get("files")
    return [name for name in (named if isinstance(named, dict) else ()) if not (checkpoint / name).is_file()]


def check_room(folder: Path | None, model: Path | None) -> Finding:
    """Free space against the next checkpoint (as large as the model's files) and the journal's next file. Bytes."""
    if folder is None:
        return unchecked("disk", Fact.STATE_UNKNOWN)
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        free, files = free_bytes(existing), os.statvfs(existing)
        checkpoint = int(SPARE * _checkpoint_bytes(folder, model))
    except OSError as error:
        return unchecked("disk", Fact.STATE_UNREADABLE, path=str(existing), reason=error.strerror, uid=os.getuid())
    values: dict[str, Any] = {"path": str(existing), "free": free, "checkpoint": checkpoint, "journal": SEGMENT_BYTES}
    if free < checkpoint + BATCH_BYTES or (files.f_files and not files.f_favail):
        return fault("disk", Fact.NO_ROOM, **values)
    if free < checkpoint + SEGMENT_BYTES:
        return warning("disk", Fact.ROOM_SMALL, **values)
    return ok("disk", Fact.ROOM, **values)


def _to_read(folder: Path) -> Iterator[Path]:
    """The files that a worker reads when it starts. Raises OSError."""
    for part in ("journal", "checkpoints"):
        if part in os.listdir(folder):
            os.listdir(folder / part)
    yield from sorted((folder / "journal").glob("*.journal"))
    yield from _metas(folder)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def _metas(folder: Path) -> list[Path]:
    """Those that are there; `check_checkpoints` tells of the others."""
    found = [path / EXTRA / META for path in _checkpoints(folder)]
    return [path for path in found if path.exists()]


def _telling_records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, record) of those that say a format: the first of each file, and all of the journal's last file.

    Raises `JournalError`, OSError.
    """
    files = sorted((folder / "journal").glob("*.journal"))
    for path in [*files, *_metas(folder)]:
        yield path, record_file.read(path, 0)
    for _, record in record_file.scan(files[-1], last=True).records if files else ():
        yield files[-1], record


def _checkpoint_bytes(folder: Path, model: Path | None) -> int:
    """What the next checkpoint takes: as much as the model's files, else as the newest checkpoint; 0 if unknown."""
    if model is not None and model.is_dir():
        return sum(path.stat().st_size for path in model.iterdir() if path.is_file())
    have = [path.parents[1] for path in _metas(folder)]
    newest = max(have, key=lambda path: int(path.name), default=None)
    return sum(path.stat().st_size for path in newest.iterdir() if path.is_file()) if newest else 0
