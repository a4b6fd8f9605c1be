"""The tables the kernels work through: which parameter and which part of it each tile is, and where its numbers lie.

Made once, on the host, from shapes alone; cuda.py copies them to the device. Positions order the parameters by what
kind of launch they need, so that a whole model is a few ranges.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from worker.apollo import state_layout
from worker.apollo.errors import ApolloError
from worker.apollo.parameters import Slot
from worker.apollo.state_layout import StateArea

TALL, WIDE, FACTORED, SMALL = 0, 1, 2, 3
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
    factor: tuple[int, int] = (16, 256)
    """Products of which gradients are made: tokens and columns at a time, where the factors are read for R."""
    small: int = 1024
    """Elements a program for AdamW."""
    chunk: int = 1024
    """Elements of R a program."""
    strip: tuple[int, int] = (128, 1)
    """The factored rule, where a program sees whole rows: rows a program, rows at a time."""
    strip_most: int = 8192
    """Columns of its widest row; wider matrices go by tiles of `wide`."""
    side: int = 256
    """Rows or columns a program, between its passes."""
    window: int = 1 << 25
    """Partial sums (fp32) that it keeps at a time: later launches use their memory again."""
    strip_warps: int = 8
    strip_stages: int = 3
    tall_warps: int = 4
    wide_warps: int = 4
    out_warps: int = 4


@dataclass(frozen=True)
class Kind:
    """Parameters that one launch can hold, given that their gradients have one dtype too."""

    shape: int
    aligned: bool
    dtype: torch.dtype
    width: int = 0
    """FACTORED: columns, padded, of the rows that one program sees; 0: it sees tiles."""
    window: int = 0
    """FACTORED: matrices of one window have partial sums of their own; the next window's take their place."""


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
    sides: int


def kind_of(slot: Slot, tiling: Tiling = Tiling()) -> Kind:
    weight = slot.matrix(slot.parameter, "the weight")
    numbers = (slot.cols, weight.stride(0), slot.place.full_cols, slot.place.col, weight.data_ptr() // 2)
    aligned = all(n % UNIT == 0 for n in numbers)
    if slot.algorithm == state_layout.FACTORED:
        width = max(1024, 1 << (slot.cols - 1).bit_length())
        return Kind(FACTORED, aligned, weight.dtype, width if width <= tiling.strip_most else 0)
    if slot.algorithm == state_layout.APOLLO:
        return Kind(TALL if slot.tall else WIDE, aligned, weight.dtype)
    return Kind(SMALL, False, weight.dtype)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Counts:
    """Of one parameter: tiles of both passes, chunks between them, vectors of partial sums (R, or sums by column), and
    how many numbers these take with those by row."""

    tiles: int
    out: int
    chunks: int = 0
    parts: int = 0
    scratch: int = 0


def counts_of(slot: Slot, kind: Kind, tiling: Tiling) -> Counts:
    if kind.shape == SMALL:
        tiles = _ceil(slot.rows * slot.cols, tiling.small)
        return Counts(tiles, tiles)
    height, _, width = tiling.out
    out = _ceil(slot.rows, height) * _ceil(slot.cols, width)
    if kind.shape == FACTORED:
        chunks = _ceil(slot.rows, tiling.side) + _ceil(slot.cols, tiling.side)
        if kind.width:
            parts = _ceil(slot.rows, tiling.strip[0])
            return Counts(parts, out, chunks, parts, _padded(2 * parts * slot.cols))
        parts, across = _ceil(slot.rows, tiling.wide[0]), _ceil(slot.cols, tiling.wide[2])
        return Counts(parts * across, out, chunks, parts, _padded(parts * slot.cols) + _padded(across * slot.rows))
    chunks = _ceil(slot.kept, tiling.chunk)
    if kind.shape == TALL:
        return Counts(_ceil(slot.rows, tiling.tall[0]), out, chunks, 1, _padded(slot.rows))
    parts = _ceil(slot.rows, tiling.wide[0])
    return Counts(parts * _ceil(slot.cols, tiling.wide[2]), out, chunks, parts, _padded(parts * slot.cols))


def _padded(count: int) -> int:
    """For 16-byte accesses: every offset a multiple of 4."""
    return 4 * _ceil(count, 4)


def scratch_of(kinds: Sequence[Kind], counts: Sequence[Counts], window: int) -> tuple[list[int], list[int], int]:
    """Where each parameter's partial sums begin, its window, and how many there are at a time. Those of the factored
    rule lie behind all others, in one place that every window fills again."""
    begin = sum(one.scratch for kind, one in zip(kinds, counts, strict=True) if kind.shape != FACTORED)
    offsets, windows, plain, at, number, end = [], [], 0, begin, 0, begin
    for kind, one in zip(kinds, counts, strict=True):
        if kind.shape != FACTORED:
            offsets.append(plain)
            plain += one.scratch
        else:
            if at > begin and at + one.scratch > begin + window:
                at, number = begin, number + 1
            offsets.append(at)
            at += one.scratch
            end = max(end, at)
        windows.append(number if kind.shape == FACTORED else 0)
    return offsets, windows, end


def _pairs(counts: Sequence[int]) -> tuple[Tensor, list[int]]:
    """int32 [sum, 2] of (position, number), and where each position starts (one more entry than positions)."""
    each = torch.tensor(counts, dtype=torch.int64)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), each.cumsum(0)])
    position = torch.repeat_interleave(torch.arange(len(counts)), each)
    number = torch.arange(int(starts[-1])) - starts[position]
    return torch.stack([position, number], dim=1).to(torch.int32), [int(start) for start in starts]


def build(slots: Sequence[Slot], groups: Sequence[int], area: StateArea, tiling: Tiling) -> Tables:
    """`groups`: by slot, the number of its parameter group."""
    kinds = {slot.index: kind_of(slot, tiling) for slot in slots}

    def place(slot: Slot) -> tuple[int, int, bool, str, int]:
        kind = kinds[slot.index]
        return kind.shape, kind.width, kind.aligned, str(kind.dtype), slot.index

    order = sorted(slots, key=place)
    by_position = [kinds[slot.index] for slot in order]
    counts = [counts_of(slot, kind, tiling) for slot, kind in zip(order, by_position, strict=True)]
    offsets, windows, scratch = scratch_of(by_position, counts, tiling.window)
    by_position = [replace(kind, window=window) for kind, window in zip(by_position, windows, strict=True)]
    tiles, tile_starts = _pairs([c.tiles for c in counts])
    out_tiles, out_starts = _pairs([c.out for c in counts])
    chunks, chunk_starts = _pairs([c.chunks for c in counts])
    rows, projections, sides = [], [0], 0
    for i, (slot, kind, count) in enumerate(zip(order, by_position, counts, strict=True)):
        m, v = area.moments(slot.index)
        taken = area.taken(slot.index)
        first = slot.place.row * slot.place.full_cols + slot.place.col
        shape = (slot.rows, slot.cols, m.data_ptr(), v.data_ptr(), projections[-1], offsets[i], count.parts)
        ranges = (tile_starts[i], count.tiles, chunk_starts[i], count.chunks)
        where = (slot.id, first, slot.place.full_cols, groups[slot.index], slot.index, out_starts[i], count.out)
        by_row = offsets[i] + _padded(count.parts * slot.cols)
        steps = ((area.step_count if taken is None else taken).data_ptr(), int(taken is not None))
        whole = (slot.kept, max(slot.whole), *_row_numbers(slot))
        factored = (sides, by_row, int(kind.width > 0))
        rows.append(shape + ranges + where + factored + steps + whole)  # as in kernels/columns.py
        is_projected = kind.shape in (TALL, WIDE)
        projections.append(projections[-1] + (_padded(slot.projected) if is_projected else 0))
        sides += _padded(slot.rows + 2 * slot.cols) if kind.shape == FACTORED else 0
    table = torch.tensor(rows, dtype=torch.int64)
    return Tables(
        order, by_position, table, tiles, out_tiles, chunks, tile_starts, out_starts, chunk_starts, projections,
        scratch, sides,
    )  # fmt: skip


NEVER = 1 << 40
"""A row that no matrix has."""


def _row_numbers(slot: Slot) -> tuple[int, int, int, int]:
    """Of a shard in up to three pieces: from which row on how much is added to a row's number, twice."""
    runs = slot.runs
    if len(runs) > 3:
        raise ApolloError(f"{slot.name} is a shard in {len(runs)} pieces: three are known on CUDA")
    shifts = [
        (rows.start, first - rows.start - (before[1] - before[0].start)) for before, (rows, first) in pairwise(runs)
    ]
    (one, by_one), (two, by_two) = [*shifts, *[(NEVER, 0)] * 2][:2]
    return one, by_one, two, by_two


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
