"""Which part of a whole tensor one of several processes holds.

    Shard((10, 4), 0, ((0, 2), (6, 3))).of(whole)    # rows 0, 1, 6, 7 and 8, end to end

A merged matrix (queries, keys and values in one) is divided inside each of its parts, so a shard may have several
pieces. Must not know: Redis, vLLM, transformers.
Invariants: pieces lie in order and do not overlap; a process that holds all of a tensor has no `Shard` of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from producer.errors import TandemError


class ShardError(TandemError):
    """The parts that processes hold do not make up the tensor."""


@dataclass(frozen=True)
class Shard:
    """`pieces` along dimension `dim` of a whole tensor of `shape`, end to end."""

    shape: tuple[int, ...]
    dim: int
    pieces: tuple[tuple[int, int], ...]
    """(first index, how many) of each."""

    @property
    def local(self) -> tuple[int, ...]:
        """The shape of the part."""
        held = sum(count for _, count in self.pieces)
        return (*self.shape[: self.dim], held, *self.shape[self.dim + 1 :])

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part of `whole`: a view where it is one piece, else a copy."""
        parts = [whole.narrow(self.dim, first, count) for first, count in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write `part` into its places in `whole`."""
        counts = [count for _, count in self.pieces]
        for (first, count), piece in zip(self.pieces, part.split(counts, self.dim), strict=True):
            whole.narrow(self.dim, first, count).copy_(piece)

    def plain(self) -> dict[str, Any]:
        """In msgpack types."""
        return {"shape": list(self.shape), "dim": self.dim, "pieces": [list(piece) for piece in self.pieces]}

    @staticmethod
    def read(plain: dict[str, Any]) -> "Shard":
        """What `plain` made. Raises `ShardError` for anything that is no part of a tensor."""
        try:
            pieces = tuple((int(first), int(count)) for first, count in plain["pieces"])
            shard = Shard(tuple(int(size) for size in plain["shape"]), int(plain["dim"]), pieces)
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"not the description of a shard ({type(error).__name__}: {error})") from None
        end = 0
        for first, count in pieces:
            if first < end or count < 1:
                raise ShardError(f"the pieces {pieces} of a shard are not in order")
            end = first + count
        if not pieces or not 0 <= shard.dim < len(shard.shape) or end > shard.shape[shard.dim]:
            raise ShardError(f"the pieces {pieces} do not lie in dimension {shard.dim} of a tensor {shard.shape}")
        return shard


def check_complete(name: str, shards: Sequence[Shard | None]) -> None:
    """The parts of tensor `name` that the processes hold, in any order, are the whole once, or the whole each.

    Raises `ShardError` otherwise: a part that some hold and others do not would be counted more than once.
    """
    if all(shard is None for shard in shards):
        return
    known = [shard for shard in shards if shard is not None]
    if len(known) != len(shards) or len({(shard.shape, shard.dim) for shard in known}) != 1:
        raise ShardError(f"{name} is divided on some ranks and whole, or divided otherwise, on others")
    end = 0
    for first, count in sorted(piece for shard in known for piece in shard.pieces):
        if first < end:
            raise ShardError(
                f"{name}: index {first} of dimension {known[0].dim} lies on two ranks and not on all. Where a model has"
                " fewer key heads than ranks, and more than one, serve it on as many GPUs as it has key heads"
            )
        if first > end:
            break
        end = first + count
    if end != known[0].shape[known[0].dim]:
        raise ShardError(f"{name}: index {end} of dimension {known[0].dim} lies on no rank")


def assemble(parts: Iterable[tuple[torch.Tensor, Shard | None]]) -> torch.Tensor:
    """The whole tensor from all ranks' parts, as a copy."""
    whole: torch.Tensor | None = None
    for part, shard in parts:
        if shard is None:
            return part.clone()
        if whole is None:
            whole = part.new_zeros(prod(shard.shape)).view(shard.shape)
        shard.put(part, whole)
    if whole is None:
        raise ShardError("no parts to assemble")
    return whole
