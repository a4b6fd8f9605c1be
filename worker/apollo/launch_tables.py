"""The tables the kernels work through: which parameter and which part of it each tile is, and where its numbers lie.

Made once, on the host, from shapes alone; cuda.py copies them to the device. Positions order the parameters by what
kind of launch they need, so that a whole model is a few ranges.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.apollo import formulas
from worker.apollo.parameters import Slot
from worker.apollo.state_layout import APOLLO, StateArea

TALL, WIDE, SMALL = 0, 1, 2
UNIT = 8
"""Elements of one Philox block, and of a 16-byte access to bf16: what "aligned" refers to."""


@dataclass(frozen=True)
class Tiling:
    """Tile shapes, in elements, and warps a program, as measured best on an H200 for Qwen3.5-27B.

    All but `out` decide the order of sums, and so the last bits of a result.
    """

    tall: tuple[int, int] = (16, 512)
    """Rows a program and columns at a time."""
    wide: tuple[int, int, int] = (512, 16, 512)
    """Rows a program, rows at a time, columns."""
    out: tuple[int, int, int] = (64, 8, 256)
    """The same in pass 2; no result depends on it."""
    small: int = 1024
    """Elements a program for AdamW."""
    chunk: int = 1024
    """Elements of R a program."""
    tall_warps: int = 4
    wide_warps: int = 4
    out_warps: int = 4


@dataclass(frozen=True)
class Kind:
    """Parameters that one launch can hold, given that their gradients have one dtype too."""

    shape: int
    aligned: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Tables:
    """`slots`, `kinds`: by position. `tiles`, `out_tiles`, `chunks`: int32 [n, 2] of (position, number within it)."""

    slots: list[Slot]
    kinds: list[Kind]
    parameters: Tensor
    tiles: Tensor
    out_tiles: Tensor
    chunks: Tensor
    tile_starts: list[int]
    out_tile_starts: list[int]
    chunk_starts: list[int]
    projections: list[int]
    scratch: int


def kind_of(slot: Slot) -> Kind:
    weight = slot.matrix(slot.parameter, "the weight")
    shape = SMALL if slot.algorithm != APOLLO else TALL if formulas.is_tall(slot.rows, slot.cols) else WIDE
    numbers = (slot.cols, weight.stride(0), slot.place.full_cols, slot.place.col, weight.data_ptr() // 2)
    return Kind(shape, shape != SMALL and all(n % UNIT == 0 for n in numbers), weight.dtype)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _counts(slot: Slot, kind: Kind, tiling: Tiling) -> tuple[int, int, int, int]:
    """(tiles of pass 1, tiles of pass 2, chunks of R, partial rows of R)."""
    if kind.shape == SMALL:
        tiles = _ceil(slot.rows * slot.cols, tiling.small)
        return tiles, tiles, 0, 0
    height, _, width = tiling.out
    out = _ceil(slot.rows, height) * _ceil(slot.cols, width)
    chunks = _ceil(max(slot.rows, slot.cols), tiling.chunk)
    if kind.shape == TALL:
        return _ceil(slot.rows, tiling.tall[0]), out, chunks, 1
    parts = _ceil(slot.rows, tiling.wide[0])
    return parts * _ceil(slot.cols, tiling.wide[2]), out, chunks, parts


def _pairs(counts: Sequence[int]) -> tuple[Tensor, list[int]]:
    """int32 [sum, 2] of (position, number), and where each position starts (one more entry than positions)."""
    each = torch.tensor(counts, dtype=torch.int64)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)])
    position = torch.repeat_interleave(torch.arange(len(counts)), each)
    number = torch.arange(int(starts[-1])) - starts[position]
    return torch.stack([position, number], dim=1).to(torch.int32), [int(start) for start in starts]


def build(slots: Sequence[Slot], groups: Sequence[int], area: StateArea, tiling: Tiling) -> Tables:
    """`groups`: by slot, the number of its parameter group."""
    kinds = {slot.index: kind_of(slot) for slot in slots}
    order = sorted(slots, key=lambda s: (kinds[s.index].shape, kinds[s.index].aligned, str(s.parameter.dtype), s.index))
    by_position = [kinds[slot.index] for slot in order]
    counts = [_counts(slot, kind, tiling) for slot, kind in zip(order, by_position, strict=True)]
    tiles, tile_starts = _pairs([c[0] for c in counts])
    out_tiles, out_starts = _pairs([c[1] for c in counts])
    chunks, chunk_starts = _pairs([c[2] for c in counts])
    rows, projections, scratch = [], [0], 0
    for i, (slot, (n_tiles, n_out, n_chunks, parts)) in enumerate(zip(order, counts, strict=True)):
        m, v = area.moments(slot.index)
        first = slot.place.row * slot.place.full_cols + slot.place.col
        shape = (slot.rows, slot.cols, m.data_ptr(), v.data_ptr(), projections[-1], scratch, parts)
        ranges = (tile_starts[i], n_tiles, chunk_starts[i], n_chunks)
        where = (slot.id, first, slot.place.full_cols, groups[slot.index], slot.index, out_starts[i], n_out)
        rows.append(shape + ranges + where)  # in the order of kernels/columns.py
        # 16-byte accesses to P and R: every offset a multiple of 4
        projections.append(projections[-1] + (4 * _ceil(min(slot.rows, slot.cols), 4) if parts else 0))
        scratch += 4 * _ceil(parts * max(slot.rows, slot.cols), 4)
    table = torch.tensor(rows, dtype=torch.int64)
    return Tables(
        order, by_position, table, tiles, out_tiles, chunks, tile_starts, out_starts, chunk_starts, projections, scratch
    )


Run = tuple[int, int, Kind, torch.dtype]
"""(first position, one past the last, their kind, their gradients' dtype): what one launch covers."""


def cut(kinds: dict[int, tuple[Kind, torch.dtype]]) -> list[Run]:
    """Positions, with the kinds and gradient dtypes that they have, as ranges of neighbours of a kind."""
    runs: list[Run] = []
    for position in sorted(kinds):
        key = kinds[position]
        if runs and runs[-1][1] == position and runs[-1][2:] == key:
            runs[-1] = (runs[-1][0], position + 1, *key)
        else:
            runs.append((position, position + 1, *key))
    return runs


def is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) % UNIT == 0


def merge(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Neighbouring runs as one range of positions."""
    spans: list[tuple[int, int]] = []
    for first, last, *_ in runs:
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return spans


class Known:
    """Recognises the pairs of an earlier update without holding on to their gradients: the same tensors, unmoved."""

    def __init__(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        self._entries = [(weakref.ref(g), g.data_ptr(), slot, slot.parameter.data_ptr()) for slot, g in pairs]

    def matches(self, pairs: Sequence[tuple[Slot, Tensor]]) -> bool:
        return len(pairs) == len(self._entries) and all(
            ref() is g and known is slot and g.data_ptr() == at and slot.parameter.data_ptr() == weight_at
            for (slot, g), (ref, at, known, weight_at) in zip(pairs, self._entries, strict=True)
        )
