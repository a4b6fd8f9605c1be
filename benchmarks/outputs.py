"""Where results go: made, and written to once, before anything is measured. No run may be lost at its end.

Must not know: what is measured.
"""

import sys
from pathlib import Path
from typing import NoReturn


def folder(path: Path) -> Path:
    """`path` as a folder that can be written to; made with its parents. Ends the script with one sentence if not."""
    try:
        _make(path)
    except OSError as error:
        _refuse(path, error)
    return path


def file(path: Path) -> Path:
    """`path` as a file that can be written; its folder is made. Ends the script with one sentence if not."""
    if path.is_dir():
        _refuse(path, "it is a folder: name a file")
    try:
        _make(path.parent)
        path.open("ab").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        _refuse(path, error)
    return path


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".probe"
    probe.touch()
    probe.unlink()


def _refuse(path: Path, reason: object) -> NoReturn:
    sys.exit(f"error: results cannot be written to {path}: {getattr(reason, 'strerror', None) or reason}")
