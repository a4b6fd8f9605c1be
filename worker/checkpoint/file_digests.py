"""What a file's bytes are called: digests of a checkpoint's files, and which model a directory holds.

Must not know: torch, Redis.
"""

import hashlib
from pathlib import Path

_SAMPLE = 64 * 1024
"""Bytes at the start and at the end of a file that `fingerprint` looks at."""


def fingerprint(source: Path) -> str:
    """Which model lies in `source`: names, sizes, starts and ends of its weight files. Reads little."""
    digest = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()[:32]


def sha256(path: Path) -> str:
    """Of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
