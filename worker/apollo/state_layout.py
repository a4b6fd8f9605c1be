"""Where the optimizer's persistent state lies in the flat memory it is handed.

    header 64 B: magic, step count t, layout digest (32 B), two spare words, all int64
    prev:  one fp32 an entry (the limiter's ||U||; unused by AdamW)
    taken: one int64 a matrix of a stack, its own step count; nothing of it where there is no stack
    then for each entry in order two fp32 vectors: m and v, of max(rows, cols) elements each for APOLLO-Mini and of
    all elements for AdamW; r (rows elements) and c (cols elements) for the factored rule. Of a shard, the part of
    these that belongs to it, or all where the divided side is projected away

A parameter is one entry. Only a stack of matrices (a mixture's experts, [E, rows, cols]) is E of them, in their order.
The layout depends on nothing but the parameters' shapes, algorithms and order, so that a restarted trainer finds its
state again in memory that outlived it. A fresh area is all zero bytes, which is the state before the first step.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.apollo.errors import ApolloError
from worker.utils.shard import Shard
from worker.utils.stacks import is_stack

APOLLO, FACTORED, ADAMW = "apollo", "factored", "adamw"
MATRIX_ALGORITHMS = (APOLLO, FACTORED)
MAGIC = int.from_bytes(b"APOLLO.1", "little")
HEADER_BYTES = 64
ALIGNMENT = 64
_STEP, _DIGEST = 1, slice(2, 6)


def algorithm_for(shape: Sequence[int], matrices: str = APOLLO) -> str:
    """Matrices and stacks of them take `matrices`; norms, biases, convolutions, A_log and dt_bias AdamW, whose state is
    small there."""
    return matrices if len(shape) == 2 or is_stack(shape) else ADAMW


def stacked(shape: Sequence[int], algorithm: str) -> int:
    """How many matrices with a state of their own a parameter is; 0 for one that is an entry as a whole."""
    return shape[0] if algorithm in MATRIX_ALGORITHMS and is_stack(shape) else 0


def moment_lengths(shape: Sequence[int], algorithm: str, shard: Shard | None = None) -> tuple[int, int]:
    """Elements of m and of v; of r and of c. shape: of what this process holds; shard: its part of the whole."""
    if algorithm == FACTORED:
        return shape[0], shape[1]
    if algorithm == APOLLO:
        whole = shape if shard is None else shard.shape
        length = shape[0] if whole[0] >= whole[1] else shape[1]
    else:
        length = math.prod(shape)
    return length, length


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Byte offsets of every entry's moments, and of its own step count where it has one; and the digest that says which
    layout this is."""

    offsets: tuple[int, ...]
    lengths: tuple[tuple[int, int], ...]
    taken: tuple[int | None, ...]
    total: int
    digest: bytes

    @staticmethod
    def of(
        shapes: Sequence[Sequence[int]],
        algorithms: Sequence[str] | None = None,
        matrices: str = APOLLO,
        shards: Sequence[Shard | None] | None = None,
    ) -> "Layout":
        parts = shards if shards is not None else [None] * len(shapes)
        names = list(algorithms) if algorithms is not None else [algorithm_for(shape, matrices) for shape in shapes]
        plan = [
            (tuple(shape), name, *([] if shard is None else [(shard.shape, shard.dim, shard.pieces)]))
            for shape, name, shard in zip(shapes, names, parts, strict=True)
        ]
        entries: list[tuple[tuple[int, ...], str, Shard | None, bool]] = []
        for given, name, shard in zip(shapes, names, parts, strict=True):
            count, shape = stacked(given, name), tuple(given)
            entries += [(shape[1:], name, None, True)] * count if count else [(shape, name, shard, False)]
        offset = counts = _align(HEADER_BYTES + 4 * len(entries))
        offset += _align(8 * sum(in_stack for *_, in_stack in entries))
        offsets, lengths, taken = [], [], []
        for shape, name, shard, in_stack in entries:
            offsets.append(offset)
            lengths.append(moment_lengths(shape, name, shard))
            taken.append(counts if in_stack else None)
            counts += 8 * in_stack
            offset += sum(_align(4 * length) for length in lengths[-1])
        digest = hashlib.sha256(repr(plan).encode()).digest()
        return Layout(tuple(offsets), tuple(lengths), tuple(taken), offset, digest)


def state_bytes(
    shapes: Sequence[tuple[int, ...]],
    algorithms: Sequence[str] | None = None,
    *,
    matrices: str = APOLLO,
    shards: Sequence[Shard | None] | None = None,
) -> int:
    """Bytes of state that `ApolloMini` needs for parameters of these shapes in this order.

    `matrices`: what matrices take, "apollo" or "factored". `algorithms` (one of these or "adamw" for each) only where a
    group overrides the choice by shape. shards: which part of a whole each is; None: all of it.
    """
    return Layout.of(shapes, algorithms, matrices, shards).total


def matrices_of(header: Tensor, shapes: Sequence[Sequence[int]]) -> str | None:
    """What matrices take ("apollo", "factored") by the first HEADER_BYTES of a state area over parameters of these
    shapes in this order, all by their shapes: None for an area that is fresh, or of others."""
    found = _digest_in(header)
    return next((name for name in MATRIX_ALGORITHMS if Layout.of(shapes, matrices=name).digest == found), None)


def is_unstacked(header: Tensor, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the state area that begins with `header` is of these parameters as an older Tandem laid it out: stacks of
    matrices took AdamW."""
    found = _digest_in(header)
    return any(is_stack(shape) for shape in shapes) and any(
        found
        == Layout.of(shapes, [ADAMW if is_stack(shape) else algorithm_for(shape, name) for shape in shapes]).digest
        for name in MATRIX_ALGORITHMS
    )


def _digest_in(header: Tensor) -> bytes:
    digest = header[:HEADER_BYTES].clone().view(torch.int64)[_DIGEST].contiguous().view(torch.uint8)
    return bytes(digest.tolist())


def steps_taken(header: Tensor) -> int:
    """The step count in the first HEADER_BYTES of a state area: a uint8 tensor on the CPU."""
    return int(header[:HEADER_BYTES].clone().view(torch.int64)[_STEP])


class StateArea:
    """The state in `memory`: a flat uint8 tensor, shared or our own, on a CPU or a GPU. Never moved."""

    def __init__(self, memory: Tensor, layout: Layout) -> None:
        """Attach, or write magic and digest into a fresh area. Raises `ApolloError` if it holds anything else."""
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ApolloError("the optimizer's state memory must be a flat, contiguous uint8 tensor")
        if memory.numel() < layout.total:
            raise ApolloError(
                f"the optimizer's state memory has {memory.numel()} bytes and these parameters need {layout.total}: "
                "size it with worker.apollo.state_bytes"
            )
        unit = 16 if memory.is_cuda else 8  # kernels load 16 bytes at a time; a file mapped by safetensors starts at 8
        if memory.data_ptr() % unit:
            raise ApolloError(f"the optimizer's state memory must start at a multiple of {unit} bytes")
        self.memory, self.layout = memory, layout
        self.header = memory[:HEADER_BYTES].view(torch.int64)
        digest = torch.frombuffer(bytearray(layout.digest), dtype=torch.int64)
        found = self.header.cpu()
        if not found.any():
            self.header[_DIGEST] = digest.to(memory.device)
            self.header[0] = MAGIC
        elif int(found[0]) != MAGIC or not torch.equal(found[_DIGEST], digest):
            raise ApolloError(
                "the optimizer's state memory belongs to other parameters (their shapes, algorithms or order differ, "
                "or an older Tandem wrote it, to which a layer's experts were one tensor): attach with the same ones, "
                "or hand in zeroed memory to start afresh, as a restarted server does"
            )

    @property
    def step_count(self) -> Tensor:
        """int64 [1], a view: the number of steps taken."""
        return self.header[_STEP : _STEP + 1]

    @property
    def previous(self) -> Tensor:
        """fp32 [entries], a view: the limiter's ||U||, 0 where there is none yet."""
        count = len(self.layout.offsets)
        return self.memory[HEADER_BYTES : HEADER_BYTES + 4 * count].view(torch.float32)

    def taken(self, index: int) -> Tensor | None:
        """int64 [1], a view: the steps that a matrix of a stack has taken; None for an entry that counts with all."""
        start = self.layout.taken[index]
        return None if start is None else self.memory[start : start + 8].view(torch.int64)

    def moments(self, index: int) -> tuple[Tensor, Tensor]:
        """(m, v) of an entry, or its (r, c): fp32 views, 1-D."""
        start, (length, other) = self.layout.offsets[index], self.layout.lengths[index]
        second = start + _align(4 * length)
        m = self.memory[start : start + 4 * length].view(torch.float32)
        return m, self.memory[second : second + 4 * other].view(torch.float32)

    def load(self, saved: Tensor) -> None:
        """Take over the bytes of another area of the same layout."""
        other = StateArea(saved.detach().clone(), self.layout)  # checks size, magic and digest
        self.memory[: self.layout.total].copy_(other.memory[: self.layout.total])
