"""The launches of a step on CUDA from gradients that are given as products: the first part of a step, if there is one.

Invariants: what is launched between `begin` and `finish` takes no memory: `Prepared` holds it all. Squared norms of all
other parameters are zero until then, which is how the kernels know whose turn it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.apollo import philox
from worker.apollo.kernels import columns, products
from worker.apollo.kernels.common import TRITON
from worker.apollo.launch_tables import TALL, UNIT, WIDE, Tiling, is_aligned, product_tiles
from worker.apollo.parameters import Slot
from worker.apollo.products import GradientProduct, Part, covers

if TYPE_CHECKING:
    from worker.apollo.cuda import CudaBackend

Given = tuple[Slot, GradientProduct]


@dataclass(frozen=True)
class Prepared:
    """Products of one step, where the kernels find them.

    table: int64 [products, PRODUCT_COLUMNS]; tiles: int32 [n, 2] of (product, number within it); positions: int64 [m]
    and squares: fp32 [m], by matrix; along: fp32 [products, T]; sides: the longest side that R has.
    """

    given: Sequence[Given]
    table: Tensor
    tiles: Tensor
    positions: Tensor
    squares: Tensor
    along: Tensor
    sides: int


def takes(on: CudaBackend, slot: Slot, parts: Sequence[Part]) -> bool:
    """Whether this matrix's gradient can be applied as these products."""
    position = on.position[slot.index]
    kind = on.tables.kinds[position]
    if slot.part is not None or slot.shard is not None or kind.shape not in (TALL, WIDE) or not kind.aligned:
        return False
    plain = all(
        tensor.dtype == torch.bfloat16 == kind.dtype and tensor.stride(-1) == 1 and is_aligned(tensor)
        for left, right, _ in parts
        for tensor in (left, right)
    )
    if not plain or not covers(parts, slot.rows) or (kind.shape == WIDE and len(parts) > 1):
        return False
    heights = [left.shape[1] for left, _, _ in parts]
    fits = (
        _tile_count(slot, parts, on.tiling)
        <= on.tables.out_tile_starts[position + 1] - on.tables.out_tile_starts[position]
    )
    return fits and all(height % UNIT == 0 for height in heights)


def prepare(on: CudaBackend, given: Sequence[Given]) -> Prepared:
    """Tables and scratch memory for these products, on the device."""
    rows: list[tuple[int, ...]] = []
    counts: list[int] = []
    most = sides = 1
    for slot, one in given:
        position, number, all = on.position[slot.index], 0, _tile_count(slot, one.parts, on.tiling)
        weight = slot.matrix(slot.parameter, "the weight")
        tall = on.tables.kinds[position].shape == TALL
        for left, right, first in one.parts:
            height = left.shape[1]
            where = (left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), len(left), first, height)
            out = (weight[first:].data_ptr(), weight.stride(0))
            rows.append((position, *where, *out, int(tall), number, all))  # as in kernels/products.py
            counts.append(product_tiles(height, slot.cols, on.tiling))
            number += counts[-1]
            most, sides = max(most, len(left)), max(sides, height if tall else slot.cols)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=on.pinned).to(on.device, non_blocking=True)
    positions = torch.tensor([on.position[slot.index] for slot, _ in given], pin_memory=on.pinned)
    return Prepared(
        given,
        table,
        on.product_tiles(tuple(counts)),
        positions.to(on.device, non_blocking=True),
        torch.stack([one.squares for _, one in given]).float(),
        torch.empty(len(rows), most, dtype=torch.float32, device=on.device),
        sides,
    )


def update(on: CudaBackend, prepared: Prepared) -> None:
    """Apply them. Raises nothing: a norm that is not finite is noted as any other is."""
    tiling, (count, most) = on.tiling, prepared.along.shape
    on.statistics[columns.SQUARES.value].index_copy_(0, prepared.positions, prepared.squares)
    height, width = tiling.factor
    products.project_factor[(count, -(-most // height))](
        on.parameters, prepared.table, on.projections, prepared.along, most,
        TYPE=TRITON[torch.bfloat16], BT=height, BC=width, num_warps=4,
    )  # fmt: skip
    products.project_product[(count, -(-prepared.sides // width))](
        on.parameters, prepared.table, on.scratch, prepared.along, most,
        TYPE=TRITON[torch.bfloat16], BT=height, BC=width, num_warps=4,
    )  # fmt: skip
    matrices = [i for i, kind in enumerate(on.tables.kinds) if kind.shape in (TALL, WIDE)]
    on.decide(matrices[0], matrices[-1] + 1)  # they are side by side; whose squares are zero are not ours
    low, high = philox.seed_words(on.options.seed)
    rows, cols, tokens = tiling.product
    products.apply_products[(len(prepared.tiles),)](
        on.parameters, prepared.table, prepared.tiles, len(on.tables.slots), on.knobs, on.area.step_count,
        on.statistics, on.partial_weights, low, high,
        TYPE=TRITON[torch.bfloat16], W_TYPE=TRITON[torch.bfloat16], STOCHASTIC=on.options.stochastic,
        UPCAST=not on.pinned, BM=rows, BN=cols, BK=tokens, SPLITS=tiling.product_splits,
        STAGES=tiling.product_stages, DOWN=tiling.product_down, num_warps=tiling.product_warps,
        maxnreg=tiling.product_registers,
    )  # fmt: skip


def _tile_count(slot: Slot, parts: Sequence[Part], tiling: Tiling) -> int:
    return sum(product_tiles(left.shape[1], slot.cols, tiling) for left, _, _ in parts)
