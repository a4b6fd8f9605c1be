"""Files of JSON objects: one a line, or in an array, or over several lines; as they arrive, with bounded memory.

A record is judged on its own; a bad one is an `InvalidTranscriptError` or `ValueError` in its place and stops nothing.
`read_transcripts` takes transcripts alone; producer/imports.py reads other formats too.
"""

from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from . import json_values
from .errors import TandemError
from .formats import ForeignFormatError
from .plain import parse_json
from .transcript import MAX_BYTES, Transcript

BLOCK = 1024 * 1024
MAX_LINE = 8 * MAX_BYTES
"""Bytes; escaped as \\uXXXX, a transcript's text may take six times its size."""

Line = json_values.Value
"""The number of the line where a record begins, from 1, and its bytes; None: too long to be kept."""

BLANK = object()
"""What `parse_line` makes of a line with nothing in it."""


class NotTranscriptsError(TandemError):
    """A file is of another format; the message names the file, the format and what to do."""


def read_transcripts(path: str) -> Iterator[tuple[int, Transcript | ValueError]]:
    """(line number, transcript or what is wrong with it) of every record of `path` (-: standard input).

    Raises NotTranscriptsError, which names what the file is, when its first record is of another format."""
    with open(0 if path == "-" else path, "rb") as file:
        first = True
        for lines, _size in records(Ahead(file)):
            for number, line in lines:
                try:
                    value = parse_line(line, first=number == 1)
                    if value is BLANK:
                        continue
                    item: Transcript | ValueError = Transcript.from_dict(value)
                except ValueError as error:  # InvalidTranscriptError is one
                    if first and isinstance(error, ForeignFormatError):
                        raise NotTranscriptsError(f"{path}: {error.problem}") from None
                    item = error
                first = False
                yield number, item


class Ahead:
    """A file whose beginning was looked at, as far as it takes to know its shape; it can still be read from the start.

    start: what was looked at; it holds the first line, or the first `BLOCK` bytes. over_lines: whether the file is no
    JSONL but an array, or an object over several lines.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.start = b""
        found = None
        while found is None and len(self.start) < BLOCK and (block := file.read1(BLOCK)):
            self.start += block
            found = is_json_over_lines(self.start)
        self.over_lines = bool(found)
        self._left = self.start

    def read1(self, size: int) -> bytes:
        """At most `size` bytes, without waiting for more than one; none at the end."""
        if not self._left:
            return self._file.read1(size)
        piece, self._left = self._left[:size], self._left[size:]
        return piece


def records(file: Ahead) -> Iterator[tuple[list[Line], int]]:
    """The records that each read completes, and the bytes read: lines, or the values of a file that is no JSONL."""
    if file.over_lines:
        return json_values.values(lambda: file.read1(BLOCK), MAX_LINE)
    return blocks(file)


def is_json_over_lines(start: bytes) -> bool | None:
    """Whether a file that begins so is no JSONL but an array, or an object over several lines; None: more is needed."""
    text = start.removeprefix(json_values.MARK).lstrip()
    if text.startswith(b"["):
        return True
    first, whole, rest = text.partition(b"\n")
    if not whole:
        return None
    if not first.startswith(b"{"):
        return False
    if first.strip() == b"{":
        return True
    if _is_json(first):
        return False
    second, whole, _ = rest.partition(b"\n")  # where this begins with an object too, only the first line is wrong
    return None if not whole else not second.startswith(b"{") and not _is_json(second)


def _is_json(line: bytes) -> bool:
    try:
        return parse_line(line, first=True) is not BLANK
    except ValueError:
        return False


def parse_line(line: bytes | ValueError | None, first: bool) -> Any:
    """The JSON of a record, BLANK if there is nothing. first: a byte order mark may come before it.

    Raises ValueError."""
    if isinstance(line, ValueError):
        raise line
    if line is None:
        raise ValueError(f"longer than {MAX_LINE:,} bytes; a transcript's limit is {MAX_BYTES:,}")
    if not line.strip():
        return BLANK
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line; convert the file to UTF-8") from None
    return parse_json(text)


def blocks(file: Ahead | BufferedReader) -> Iterator[tuple[list[Line], int]]:
    """The complete lines of each read, numbered from 1, and the bytes read."""
    number = 0
    pending = bytearray()
    too_long = False
    while block := file.read1(BLOCK):  # what is there, without waiting for more
        lines: list[Line] = []
        *ended, rest = block.split(b"\n")
        for piece in ended:
            number += 1
            pending += piece
            lines.append((number, None if too_long or len(pending) > MAX_LINE else bytes(pending)))
            pending.clear()
            too_long = False
        pending += rest
        if len(pending) > MAX_LINE:
            pending.clear()
            too_long = True
        yield lines, len(block)
    if pending or too_long:
        yield [(number + 1, None if too_long else bytes(pending))], 0
