"""The batch record beside the weights: what the version last applied, or being applied, was made of.

Two slots, written in turn: {sequence, length, crc32, payload}. A write that a kill cut short fails its crc, and the
record before it is read instead.

Must not know: Redis.
"""

import struct
import zlib
from typing import Any

import msgpack
import torch

from producer.errors import TandemError

RECORD_BYTES = 8 * 2**20
"""Size of the area: two slots of 4 MiB, some ten thousand jobs each."""

_HEAD = struct.Struct("<QQI4x")  # sequence (0: never written), length of the payload, crc32 of sequence+length+payload


class RecordError(TandemError):
    """The record does not fit, or neither slot holds a whole one."""


class RecordArea:
    """Reads and writes the record in `tensor`, a zero-initialised uint8 tensor (any device) in the weights' memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() < 2 * (_HEAD.size + 1):
            raise RecordError(f"a record area is a flat uint8 tensor, not {tuple(tensor.shape)} {tensor.dtype}")
        half = tensor.numel() // 2
        self._slots = (tensor[:half], tensor[half : 2 * half])
        self.capacity = half - _HEAD.size

    def write(self, record: dict[str, Any]) -> None:
        """Store `record` (msgpack types only); `RecordError` if it is larger than `capacity` bytes."""
        payload = msgpack.packb(record, use_bin_type=True)
        if len(payload) > self.capacity:
            raise RecordError(
                f"a batch record of {len(payload)} bytes is over the {self.capacity} that the server keeps beside"
                " the weights: use fewer jobs per batch"
            )
        sequences = [sequence for sequence, _ in self._slots_read()]
        slot = self._slots[0] if sequences[0] <= sequences[1] else self._slots[1]
        sequence = max(sequences) + 1
        head = _HEAD.pack(sequence, len(payload), _crc(sequence, payload))
        data = torch.frombuffer(bytearray(head + payload), dtype=torch.uint8)
        slot[: data.numel()].copy_(data)

    def read(self) -> dict[str, Any] | None:
        """The last record that was wholly written, or None if none ever was; `RecordError` if both slots are broken."""
        sequence, payload = max(self._slots_read(), key=lambda slot: slot[0])
        if sequence:
            return _unpack(payload)
        if all(slot[: _HEAD.size].any().item() for slot in self._slots):
            # One slot alone would be: the very first write was cut short, and there was no record before it.
            raise RecordError("the batch record beside the weights is damaged: restart the server")
        return None

    def _slots_read(self) -> list[tuple[int, bytes]]:
        """(sequence, payload) of each slot; sequence 0 where it is empty or broken."""
        return [_slot_read(slot) for slot in self._slots]


def _slot_read(slot: torch.Tensor) -> tuple[int, bytes]:
    sequence, length, crc = _HEAD.unpack(bytes(slot[: _HEAD.size].cpu().tolist()))
    if sequence == 0 or length > slot.numel() - _HEAD.size:
        return 0, b""
    payload = slot[_HEAD.size : _HEAD.size + length].cpu().contiguous().numpy().tobytes()
    return (sequence, payload) if _crc(sequence, payload) == crc else (0, b"")


def _crc(sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQ", sequence, len(payload))))


def _unpack(payload: bytes) -> dict[str, Any]:
    try:
        record = msgpack.unpackb(payload, raw=False)
    except Exception as error:  # msgpack raises several unrelated types
        raise RecordError(f"the batch record beside the weights is not msgpack ({type(error).__name__})") from None
    if not isinstance(record, dict):
        raise RecordError(f"the batch record beside the weights is a {type(record).__name__}, not a map")
    return record
