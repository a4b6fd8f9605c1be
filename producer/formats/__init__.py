"""Formats of others that hold conversations: one file a format, each a pure function from a record to a `Record`.

`table` lists them, in the order in which a record is compared with them. Must not know: Redis.
Invariants: a reader raises `InvalidTranscriptError` or `LeaveOut` and nothing else, whatever JSON it is given; it
changes nothing that it is given; an answer that was disliked or rejected never comes out as one to learn
(`Record.transcript`).
"""

from .ratings import ScaleError
from .record import LeaveOut, Reason, Record
from .table import FORMATS, READ, ForeignFormatError, Format, by_name, foreign, near_miss, recognise

__all__ = ["FORMATS", "READ", "ForeignFormatError", "Format", "LeaveOut", "Reason", "Record", "ScaleError"]
__all__ += ["by_name", "foreign", "near_miss", "recognise"]
