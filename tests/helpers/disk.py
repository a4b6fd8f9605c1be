"""A disk that remembers what was synced: what would be there after a power cut."""

import os
import stat
from pathlib import Path

import pytest


class Disk:
    """Everything below `folder`, as of now and as synced from now on.

    POSIX promises no more than this: a file has the bytes of its last fsync, and a folder the names of its own.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.files: dict[int, bytes] = {}
        self.folders: dict[int, dict[str, os.DirEntry[str]]] = {}
        for root, _, _ in os.walk(folder):
            self._note(Path(root))
        for path in folder.rglob("*"):
            if path.is_file():
                self._note(path)
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, handle: int) -> None:
        self._fsync(handle)
        self._note(Path(f"/proc/self/fd/{handle}"))

    def _note(self, path: Path) -> None:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            self.folders[info.st_ino] = {entry.name: entry for entry in os.scandir(path)}
        else:
            self.files[info.st_ino] = path.read_bytes()

    def after_a_power_cut(self, target: Path) -> Path:
        """A copy of the folder, as it would be found."""
        self._copy(self.folder.stat().st_ino, target)
        return target

    def _copy(self, folder: int, target: Path) -> None:
        target.mkdir()
        for name, entry in self.folders.get(folder, {}).items():  # durable names; what is behind them may not be
            if entry.is_dir(follow_symlinks=False):
                self._copy(entry.inode(), target / name)
            else:
                (target / name).write_bytes(self.files.get(entry.inode(), b""))
