"""The factored rule's launches on CUDA: pass 1, and what comes between the passes. The write is every matrix's.

A matrix whose rows have at most `Tiling.strip_most` columns is read once for all sums; a wider one twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker.apollo.kernels import columns, factored
from worker.apollo.kernels.common import TRITON
from worker.apollo.launch_tables import Run, merge

if TYPE_CHECKING:
    from worker.apollo.cuda import CudaBackend


def measure(on: CudaBackend, run: Run) -> None:
    """The means of G^2 by row and by column, S where whole rows are seen, and every tile's share of ||G||^2."""
    first, last, kind, dtype = run
    tables, tiling = on.tables, on.tiling
    tile, end = tables.tile_starts[first], tables.tile_starts[last]
    where = (on.parameters, on.bindings, on.tiles, tile)
    if kind.width:
        total, height = tiling.strip
        factored.sum_strip[(end - tile,)](
            *where, on.knobs, on.sides, on.scratch, on.partial_squares,
            G_TYPE=TRITON[dtype], ALIGNED=kind.aligned, TR=total, BR=height, BC=kind.width,
            STAGES=tiling.strip_stages, num_warps=_warps(on, kind.width),
        )  # fmt: skip
    else:
        total, height, width = tiling.wide
        factored.sum_tile[(end - tile,)](
            *where, on.scratch, on.partial_squares,
            G_TYPE=TRITON[dtype], ALIGNED=kind.aligned, TR=total, BR=height, BC=width, num_warps=tiling.wide_warps,
        )  # fmt: skip
    chunk, end = tables.chunk_starts[first], tables.chunk_starts[last]
    factored.collapse[(end - chunk,)](
        on.parameters, on.chunks, chunk, on.scratch, on.sides,
        ACROSS=tiling.wide[2], BLOCK=tiling.side, PARTS_=16, num_warps=4,
    )  # fmt: skip


def decide(on: CudaBackend, runs: Sequence[Run]) -> None:
    """r, c, and from them what every row, column and matrix is multiplied with."""
    tables = on.tables
    for first, last in merge(runs):
        chunk, end = tables.chunk_starts[first], tables.chunk_starts[last]
        factored.follow[(end - chunk,)](
            on.parameters, on.chunks, chunk, on.knobs, on.statistics, on.sides, on.partial_norms, on.control,
            BLOCK=on.tiling.side, num_warps=2,
        )  # fmt: skip
    wide = [run for run in runs if not run[2].width]
    for run in wide:
        _square_update(on, run)
    for first, last in merge(wide):
        moved = on.statistics[columns.MOVED.value]
        on.total(first, last, columns.TILE, columns.TILES, on.partial_squares, moved)
    for first, last in merge(runs):
        factored.matrix_size[(last - first,)](
            on.parameters, first, len(tables.slots), on.knobs, on.statistics, on.partial_norms, on.control,
            BLOCK=256, num_warps=2,
        )  # fmt: skip


def _square_update(on: CudaBackend, run: Run) -> None:
    first, last, kind, dtype = run
    total, height, width = on.tiling.wide
    tile, end = on.tables.tile_starts[first], on.tables.tile_starts[last]
    factored.square_update[(end - tile,)](
        on.parameters, on.bindings, on.tiles, tile, on.sides, on.partial_squares,
        G_TYPE=TRITON[dtype], ALIGNED=kind.aligned, TR=total, BR=height, BC=width, num_warps=on.tiling.wide_warps,
    )  # fmt: skip


def _warps(on: CudaBackend, width: int) -> int:
    """Narrow rows need fewer: 8 elements a thread at least."""
    return max(1, min(on.tiling.strip_warps, width // 256))
