"""Messages between the members of a group: msgpack maps of bounded length, as uint8 tensors, from one to one.

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: the length comes first, and one over the limit is refused before memory is taken for it; nothing is ever
unpickled.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from worker.distributed.errors import GroupLostError
from worker.utils.messages import MAX_MESSAGE, WireError, pack, unpack


def send(message: dict[str, Any], to: int, seconds: float) -> None:
    """To the member at place `to`. Raises RuntimeError from torch where it is gone, or takes longer than `seconds`, and
    `WireError` for a message that is too long."""
    body = bytearray(pack(message))
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
        return unpack(body.numpy().tobytes(), numbered=True)
    except WireError as error:
        raise GroupLostError(f"the replica at place {source} sent what is no message: {error}") from None


def _wait(work: Any, seconds: float) -> None:
    work.wait(timedelta(seconds=seconds))
