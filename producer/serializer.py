"""The serializer RQ uses on both sides: msgpack, never pickle.

Knows: RQ's contract `dumps(obj) -> bytes`, `loads(bytes) -> obj`. Aware datetimes round-trip, tuples become lists;
naive datetimes, sets and integers over 64 bits raise at enqueue. Decoding is bounded by the size of its input: msgpack
checks every announced length against the bytes that are there.
"""

from typing import Any

import msgpack


class MsgpackSerializer:
    """RQ serializer. Decoding untrusted bytes yields plain data or raises `ValueError`, never runs code."""

    @staticmethod
    def dumps(obj: Any) -> bytes:
        packed: bytes = msgpack.packb(obj, datetime=True, use_bin_type=True)
        return packed

    @staticmethod
    def loads(data: bytes) -> Any:
        try:
            return msgpack.unpackb(data, timestamp=3, raw=False, strict_map_key=True)
        except ValueError:
            raise
        except Exception as error:  # msgpack's own exceptions do not all derive from ValueError
            raise ValueError(f"not a msgpack message: {type(error).__name__}") from error
