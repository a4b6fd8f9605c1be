"""The worker's state directory: where the journal and the checkpoints of one model's weights lie.

    DIR/lock   DIR/journal/00000001.journal ...   DIR/checkpoints/VERSION/ ...

Must not know: torch, Redis.
Invariants: folders are 0700 and files 0600, ours; one process at a time writes here (a lock that the kernel drops when
its holder dies); `replace` leaves the old file or the new one, whole, whatever happens.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from producer.errors import TandemError


class StateError(TandemError):
    """The state directory cannot be used; the message names it and says what to do."""


def default_state_dir(model: Path, replica: int = 0) -> Path:
    """$TANDEM_STATE_DIR, else a folder for `model` (by its resolved path) below the user's state directory. Replicas
    from 1 on have one of their own beside it."""
    own = f"-replica-{replica}" if replica else ""
    if configured := os.environ.get("TANDEM_STATE_DIR"):
        return Path(configured + own)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    resolved = model.resolve()
    return Path(home) / "tandem" / f"{resolved.name}-{hashlib.sha256(bytes(resolved)).hexdigest()[:8]}{own}"


class StateDir:
    """The directory `path`, locked for this process from `open` to `close`; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path / "journal"
        self.checkpoints = path / "checkpoints"
        self._lock: Any = None

    def open(self) -> Self:
        """Create what is missing, check that it is ours and writable, and lock it. Raises `StateError`."""
        try:
            for folder in (self.path, self.journal, self.checkpoints):
                _make(folder)
                _check_ours(folder)
            self._lock = open(self.path / "lock", "a+", opener=_private)  # noqa: SIM115  (held for as long as we are)
        except OSError as error:
            raise StateError(
                f"state directory {self.path} cannot be written ({error.strerror}): make it writable, or name another"
                " with --state-dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read(20).strip() or "unknown"
            self._lock.close()
            raise StateError(
                f"state directory {self.path} is in use by process {holder}: stop it first, or name another directory"
                " with --state-dir"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        return self

    def close(self) -> None:
        """Drop the lock. Idempotent."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _make(folder: Path) -> None:
    """Make `folder` and its parents, durably: what is written into it must not vanish with its name."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
        sync(one.parent)


def _check_ours(folder: Path) -> None:
    info = folder.stat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise StateError(f"{folder} is not a folder of uid {os.getuid()}: name another with --state-dir")
    if info.st_mode & 0o077:
        folder.chmod(0o700)


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Write `data` as `path`, durably: a temporary name, fsync, rename, fsync of the folder."""
    new = temporary(path)
    with open(new, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync(path.parent)


def temporary(path: Path) -> Path:
    """What `replace` calls a file while it is not whole."""
    return path.with_name(f".{path.name}.new")


def used_bytes(folder: Path) -> int:
    """Size of all files below `folder`; those that vanish meanwhile count nothing."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(here, name)).st_size
    return total


def free_bytes(folder: Path) -> int:
    """What an unprivileged process may still write below `folder`."""
    return shutil.disk_usage(folder).free
