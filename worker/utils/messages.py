"""A message between Tandem's processes: one msgpack map of bounded length, over a Unix socket or between replicas.

    body = pack({"op": "hello"})
    message = unpack(body)

Must not know: sockets, torch, Redis.
Invariant: nothing is ever unpickled, and whatever is not such a map is a `WireError`.
"""

from typing import Any

import msgpack

from producer.errors import TandemError

MAX_MESSAGE = 64 * 2**20
"""Bytes. The largest is a batch for replicas: tokens, masks and transcripts of a version. The description of a 27B
model's parameters is under 1 MB."""


class WireError(TandemError):
    """The other side is not there, is not ours, or did not speak this protocol."""


def pack(message: dict[str, Any]) -> bytes:
    """The bytes of `message`; `WireError` for too many."""
    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_MESSAGE:
        raise WireError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return body


def unpack(body: bytes, *, numbered: bool = False) -> dict[str, Any]:
    """The map in `body`; `WireError` for anything else. numbered: maps in it may have numbers for keys."""
    if len(body) > MAX_MESSAGE:
        raise WireError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=not numbered)
    except Exception as error:  # msgpack raises several unrelated types on garbage
        raise WireError(f"not a msgpack message ({type(error).__name__})") from None
    if not isinstance(message, dict):
        raise WireError(f"a message must be a map, not {type(message).__name__}")
    return message
