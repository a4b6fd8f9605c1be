"""Messages between the members of a group: msgpack maps of bounded length, as uint8 tensors, from one to one.

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: the length comes first, and one over the limit is refused before memory is taken for it; nothing is ever
unpickled.
"""

from datetime import timedelta
from typing import Any

import msgpack
import torch
import torch.distributed as dist

from worker.distributed.errors import GroupLostError

MAX_MESSAGE = 64 * 2**20
"""Bytes. The largest is a batch: tokens, masks and transcripts of a version."""


def send(message: dict[str, Any], to: int, seconds: float) -> None:
    """To the member at place `to`. Raises RuntimeError from torch where it is gone, or takes longer than `seconds`."""
    body = bytearray(msgpack.packb(message, use_bin_type=True))
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    for part in (torch.tensor([len(body)], dtype=torch.int64), torch.frombuffer(body, dtype=torch.uint8)):
        _wait(dist.isend(part, to), seconds)


def receive(source: int, seconds: float) -> dict[str, Any]:
    """From the member at place `source`. Raises as `send`, and `GroupLostError` for what is no message."""
    length = torch.zeros(1, dtype=torch.int64)
    _wait(dist.irecv(length, source), seconds)
    size = int(length)
    if not 0 < size <= MAX_MESSAGE:
        raise GroupLostError(f"the replica at place {source} announced a message of {size} bytes, over {MAX_MESSAGE}")
    body = torch.empty(size, dtype=torch.uint8)
    _wait(dist.irecv(body, source), seconds)
    try:
        return unpack(body.numpy().tobytes())
    except ValueError as error:
        raise GroupLostError(f"the replica at place {source} sent what is no message: {error}") from None


def unpack(body: bytes) -> dict[str, Any]:
    """The map in `body`. Raises ValueError for anything else."""
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"{len(body)} bytes are over the limit of {MAX_MESSAGE}")
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises several unrelated types on garbage
        raise ValueError(f"not a msgpack message ({type(error).__name__})") from None
    if not isinstance(message, dict):
        raise ValueError(f"a message must be a map, not {type(message).__name__}")
    return message


def _wait(work: Any, seconds: float) -> None:
    work.wait(timedelta(seconds=seconds))
