"""Files of any format that Tandem reads, as transcripts ready to be queued, in blocks as they arrive.

The format is found from the first records, or named. It holds for the whole file: a record of another one is an error
in its place. Must not know: Redis.
Invariants: memory is bounded by a block and a record; an id is the same whenever a file is read; what was disliked or
rejected is never a demonstration; of a file with a rating on an unknown scale nothing is handed on; of a pipe, which
cannot be read twice, nothing from the block with that rating on.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from . import jsonl, looks
from .errors import InvalidTranscriptError
from .formats import READ, Format, LeaveOut, Reason, ScaleError, by_name, near_miss, recognise
from .formats.record import Pairs, record_id
from .jsonl import NotTranscriptsError
from .transcript import Transcript

Item = tuple[int, Transcript | ValueError]
"""Line number, and the transcript or what is wrong with it."""

AUTO = "auto"
KNOWN = ", ".join(item.name for item in READ)


class Import:
    """One file being read. `blocks` is to be called once.

    name: the file's, for errors. format_name: AUTO, or that of a format. dislikes, pairs: see `Record.transcript`.
    As it is read, `format` is what was found, `left_out` counts by reason what is not queued, and `strays` counts
    records of other formats after the first, which are not reported one by one.
    """

    def __init__(
        self,
        file: BufferedReader,
        name: str,
        format_name: str = AUTO,
        *,
        dislikes: bool = True,
        pairs: Pairs = "learn",
    ) -> None:
        self.name, self.dislikes, self.pairs = name, dislikes, pairs
        self.format: Format | None = None if format_name == AUTO else by_name[format_name]
        self.left_out: Counter[Reason] = Counter()
        self.strays: Counter[str] = Counter()
        self._file = file
        self._named = format_name != AUTO  # then a record that a more special format fits too is read as it was named
        self._strayed = False

    def blocks(self) -> Iterator[tuple[list[Item], int]]:
        """The records that each read completes but those left out, and the bytes read.

        Raises NotTranscriptsError, which names the file, where all of it is of no use: it is of no known format, or its
        ratings are on an unknown scale.
        """
        self._check_scale()
        file = jsonl.Ahead(self._file)
        for lines, size in jsonl.records(file):
            parsed = _parsed(lines)
            if self.format is None:
                self.format = self._recognised(parsed, file.start)
            yield [item for number, value in parsed if (item := self._item(number, value)) is not None], size

    def _check_scale(self) -> None:
        """Read the whole file for its ratings, and go back to its start. A pipe is left as it is."""
        if not self._file.seekable():
            return
        start, known = self._file.tell(), self.format
        for lines, _size in jsonl.records(jsonl.Ahead(self._file)):
            parsed = _parsed(lines)
            known = known or _first(parsed)
            if parsed and (known is None or not known.readable):
                break  # refused later, by its first records
            for number, value in parsed:
                if known is None or not isinstance(value, dict) or not self._fits(known, value):
                    continue
                try:
                    known.read(value)
                except ScaleError as error:
                    raise NotTranscriptsError(f"{self.name}:{number}: {error}. Nothing was queued") from None
                except (LeaveOut, InvalidTranscriptError):
                    pass  # said when it is read to be queued
        self._file.seek(start)

    def _fits(self, known: Format, value: dict[str, Any]) -> bool:
        return known.matches(value) if self._named else recognise(value) is known

    def _recognised(self, parsed: list[tuple[int, Any]], start: bytes) -> Format | None:
        """The format of the first record that has one; None where no record says anything yet."""
        found = _first(parsed)
        if found is not None and not found.readable:
            raise self._refused(f"holds {found.title}, a format that Tandem does not read")
        if found is None and parsed:
            sound = [value for _, value in parsed if not isinstance(value, ValueError)]
            if isinstance(parsed[0][1], ValueError) and (says := looks.like(start)):
                raise self._refused(f"looks like {says}")
            if sound:
                raise self._refused(f"looks like {near_miss(sound[0])}")
        return found

    def _refused(self, what: str) -> NotTranscriptsError:
        return NotTranscriptsError(f"{self.name}: {what}. Known formats: {KNOWN}")

    def _item(self, number: int, value: Any) -> Item | None:
        """None for a record that is only counted."""
        try:
            if isinstance(value, ValueError):
                raise value
            return number, self._transcript(value)
        except LeaveOut as left:
            self.left_out[left.reason] += 1
            return None
        except _StrayError as stray:
            if self._strayed:
                self.strays[stray.name] += 1
                return None
            self._strayed = True
            return number, stray
        except ScaleError as error:
            raise NotTranscriptsError(
                f"{self.name}:{number}: {error}. Reading stopped here, and what was read together with this"
                " record was not queued"
            ) from None
        except ValueError as error:  # InvalidTranscriptError is one
            return number, error

    def _transcript(self, value: Any) -> Transcript:
        known = self.format
        if known is None:
            raise InvalidTranscriptError("record", f"is of no known format; known formats: {KNOWN}")
        if not isinstance(value, dict):
            raise InvalidTranscriptError("record", f"must be an object, not {type(value).__name__}")
        if not self._fits(known, value):
            if (found := recognise(value)) is not None:
                raise _StrayError(known, found)
            if known.name != "messages":
                raise InvalidTranscriptError("record", f"holds none of {known.title}")
        record = known.read(value)
        fields = record.transcript(dislikes=self.dislikes, pairs=self.pairs)
        if self.pairs == "chosen" and record.rejected is not None:
            with contextlib.suppress(LeaveOut):  # then it is checked as well as it can be
                _valid(known, record.transcript())
        if fields.get("id") is None:
            fields = fields | {"id": record_id(record.id, fields, unique=known.unique, said_by=record.users)}
        return _valid(known, fields)


def _valid(known: Format, fields: dict[str, Any]) -> Transcript:
    try:
        return Transcript.from_dict(fields)
    except InvalidTranscriptError as error:
        if known.name == "messages":
            raise
        raise InvalidTranscriptError(f"as a transcript, {error.field}", error.problem) from None


class _StrayError(InvalidTranscriptError):
    """A record of another known format than the file's."""

    def __init__(self, known: Format, other: Format) -> None:
        self.name = other.name
        super().__init__(
            "record",
            f"here the file changes from {known.short} to {other.short}: put each format into a file of its own",
        )


def _first(parsed: list[tuple[int, Any]]) -> Format | None:
    """The format of the first record that has one."""
    return next((found for _, value in parsed if (found := recognise(value)) is not None), None)


def _parsed(lines: list[jsonl.Line]) -> list[tuple[int, Any]]:
    """Number and JSON of each line that is not blank, or the ValueError that says what is wrong with it."""
    read = ((number, _value(number, line)) for number, line in lines)
    return [(number, value) for number, value in read if value is not jsonl.BLANK]


def _value(number: int, line: bytes | ValueError | None) -> Any:
    try:
        return jsonl.parse_line(line, first=number == 1)
    except ValueError as error:
        return error
