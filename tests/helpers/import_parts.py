"""Files as `tandem enqueue` reads them, from bytes."""

import io
import json
from io import BufferedReader, BytesIO
from typing import Any

from producer.formats.record import Pairs
from producer.imports import AUTO, Import
from producer.transcript import Transcript


class Pieces(io.RawIOBase):
    """A pipe that gives `size` bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._left, self._size = data, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece, self._left = self._left[: self._size], self._left[self._size :]
        buffer[: len(piece)] = piece
        return len(piece)


def read(
    data: bytes, format_name: str = AUTO, *, dislikes: bool = True, pairs: Pairs = "learn", size: int | None = None
) -> tuple[Import, list[tuple[int, Transcript | ValueError]]]:
    """The import of a file of `data`, and its items with their lines. size: bytes that the file gives at a time."""
    file = BufferedReader(BytesIO(data)) if size is None else BufferedReader(Pieces(data, size))  # type: ignore[arg-type]
    source = Import(file, "f", format_name, dislikes=dislikes, pairs=pairs)
    return source, [item for items, _size in source.blocks() for item in items]


def lines(*values: Any) -> bytes:
    """JSONL."""
    return b"\n".join(json.dumps(value).encode() for value in values)
