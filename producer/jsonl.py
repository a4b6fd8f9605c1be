"""JSONL of transcripts: numbered lines, as they arrive, with bounded memory.

A line is validated on its own; a bad one is an `InvalidTranscriptError` or `ValueError` in its place and stops nothing.
A file of another format is refused as a whole.
"""

from collections.abc import Iterator
from io import BufferedReader

from .errors import TandemError
from .formats import ForeignFormatError, recognise_file
from .plain import parse_json
from .transcript import MAX_BYTES, Transcript

BLOCK = 1024 * 1024
MAX_LINE = 8 * MAX_BYTES
"""Bytes; escaped as \\uXXXX, a transcript's text may take six times its size."""

Line = tuple[int, bytes | None]
"""Its number, from 1, and its bytes without the newline; None: too long to be kept."""


class NotTranscriptsError(TandemError):
    """A file is of another format; the message names the file, the format and what to do."""


def read_transcripts(path: str) -> Iterator[tuple[int, Transcript | ValueError]]:
    """(line number, transcript or what is wrong with it) of every line of `path` (-: standard input) but blank ones.

    Raises NotTranscriptsError, which names what the file is, when the file is of another format."""
    with open(0 if path == "-" else path, "rb") as file:
        for lines, _size in checked_blocks(file, path):
            for number, line in lines:
                try:
                    transcript = parse_line(line, first=number == 1)
                except ValueError as error:  # InvalidTranscriptError is one
                    yield number, error
                else:
                    if transcript is not None:
                        yield number, transcript


def checked_blocks(file: BufferedReader, name: str) -> Iterator[tuple[list[Line], int]]:
    """As `blocks`; NotTranscriptsError when the start of the file, or its first line, says that all of it is of
    another format. `name`: the file's, for the error."""
    if problem := recognise_file(file.peek()):
        raise NotTranscriptsError(f"{name}: {problem}")
    looked = False
    for lines, size in blocks(file):
        if not looked and (first := next((line for line in lines if line[1] is None or line[1].strip()), None)):
            looked = True
            try:
                parse_line(first[1], first=first[0] == 1)
            except ForeignFormatError as error:
                raise NotTranscriptsError(f"{name}: {error.problem}") from None
            except ValueError:  # reported in its place
                pass
        yield lines, size


def parse_line(line: bytes | None, first: bool) -> Transcript | None:
    """The transcript of a line, None for a blank one. Raises ValueError."""
    if line is None:
        raise ValueError(f"longer than {MAX_LINE:,} bytes; a transcript's limit is {MAX_BYTES:,}")
    if not line.strip():
        return None
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line; convert the file to UTF-8") from None
    return Transcript.from_dict(parse_json(text))


def blocks(file: BufferedReader) -> Iterator[tuple[list[Line], int]]:
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
