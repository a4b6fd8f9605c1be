"""One file of the journal: checksummed msgpack records, one after another.

    magic "TDJ1", length, crc32 of the payload, crc32 of these twelve bytes; payload (one msgpack map)

Invariants: what `read` returns was written whole; a tail that a crash cut short is told apart from damage in the
middle; reading changes nothing.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from producer.errors import TandemError

MAGIC = b"TDJ1"
_HEAD = struct.Struct("<4sIII")


class JournalError(TandemError):
    """The journal cannot be written or read; the message names file, offset and the way out."""


@dataclass(frozen=True)
class Scan:
    """What a file holds: (offset, record) in order, and where its whole records end."""

    records: list[tuple[int, dict[str, Any]]]
    end: int
    torn: int
    """Bytes after `end` that a crash left of an unfinished record."""


def pack(record: dict[str, Any]) -> bytes:
    """The bytes of one record."""
    payload: bytes = msgpack.packb(record, use_bin_type=True)
    head = _HEAD.pack(MAGIC, len(payload), zlib.crc32(payload), 0)[:12]
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def scan(path: Path, *, last: bool) -> Scan:
    """Read and check the whole file. `last`: it is the one being written, so that its tail may be torn.

    Raises `JournalError` for anything else that is not a record.
    """
    data = path.read_bytes()
    records, offset = [], 0
    while offset < len(data):
        payload = _payload(data, offset)
        if payload is None:
            if last and not any(_later(data, offset + 1)):
                break
            raise damaged(path, offset)
        records.append((offset, _unpack(payload, path, offset)))
        offset += _HEAD.size + len(payload)
    return Scan(records, offset, len(data) - offset)


def read(path: Path, offset: int) -> dict[str, Any]:
    """The record at `offset`, checked again. Raises `JournalError`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            head = file.read(_HEAD.size)
            length = _HEAD.unpack(head)[1] if len(head) == _HEAD.size else 0
            payload = _payload(head + file.read(length), 0)
    except OSError as error:
        raise JournalError(f"journal {path} cannot be read ({error.strerror})") from None
    if payload is None:
        raise damaged(path, offset)
    return _unpack(payload, path, offset)


def damaged(path: Path, offset: int) -> JournalError:
    """What a person can do about a record that is not what was written."""
    return JournalError(
        f"journal {path} is damaged at byte {offset}: the disk changed what was written there. Put this file back from"
        f" a backup. Without one: while the server still runs, move {path.parent} aside and start the worker, which"
        " then writes a checkpoint of the weights as they are; after a restart of the server, move it aside and the"
        " worker goes on from the newest checkpoint"
    )


def _payload(data: bytes, offset: int) -> bytes | None:
    """The payload of the record at `offset`; None if no whole and sound record lies there."""
    head = data[offset : offset + _HEAD.size]
    if len(head) < _HEAD.size:
        return None
    magic, length, crc, own = _HEAD.unpack(head)
    payload = data[offset + _HEAD.size : offset + _HEAD.size + length]
    sound = magic == MAGIC and zlib.crc32(head[:12]) == own and len(payload) == length and zlib.crc32(payload) == crc
    return payload if sound else None


def _later(data: bytes, start: int) -> Iterator[int]:
    """Offsets from `start` on at which a sound record lies: a torn tail has none behind it."""
    while (start := data.find(MAGIC, start)) >= 0:
        if _payload(data, start) is not None:
            yield start
        start += 1


def _unpack(payload: bytes, path: Path, offset: int) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(payload, raw=False)
    except Exception as error:  # msgpack raises several unrelated types
        raise JournalError(f"journal {path}, byte {offset}: not msgpack ({type(error).__name__})") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise JournalError(f"journal {path}, byte {offset}: not a record of this version of Tandem")
    return record
