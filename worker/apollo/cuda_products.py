"""A step on CUDA is decided from products of which gradients are made: moments, limiter, and what each gradient is
multiplied with, before a gradient is there. `write` then reads it once, where an update reads it twice.

It is the first part of a step, if there is one. Invariants: what is launched between `begin` and `finish` takes no
memory: `Prepared` holds it all. Squared norms of all other parameters are zero until then, which is how the kernels
know whose turn it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worker.apollo.kernels import columns, products
from worker.apollo.kernels.common import TRITON
from worker.apollo.launch_tables import TALL, UNIT, WIDE, is_aligned
from worker.apollo.parameters import Slot
from worker.apollo.products import GradientProduct, Part, covers

if TYPE_CHECKING:
    from worker.apollo.cuda import CudaBackend

Given = tuple[Slot, GradientProduct]


@dataclass(frozen=True)
class Prepared:
    """Products of one step, where the kernels find them.

    table: int64 [products, PRODUCT_COLUMNS]; positions: int64 [m] and squares: fp32 [m], by matrix; along: fp32
    [products, T]; sides: the longest side that R has.
    """

    given: Sequence[Given]
    table: Tensor
    positions: Tensor
    squares: Tensor
    along: Tensor
    sides: int


def takes(on: CudaBackend, slot: Slot, parts: Sequence[Part]) -> bool:
    """Whether the step of this matrix can be decided from these products."""
    kind = on.tables.kinds[on.position[slot.index]]
    if slot.part is not None or slot.shard is not None or kind.shape not in (TALL, WIDE) or not kind.aligned:
        return False
    plain = all(
        tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1 and is_aligned(tensor)
        for left, right, _ in parts
        for tensor in (left, right)
    )
    if not plain or not covers(parts, slot.rows) or (kind.shape == WIDE and len(parts) > 1):
        return False
    return all(left.shape[1] % UNIT == 0 for left, _, _ in parts)


def prepare(on: CudaBackend, given: Sequence[Given]) -> Prepared:
    """Tables and scratch memory for these products, on the device."""
    rows: list[tuple[int, ...]] = []
    most = sides = 1
    for slot, one in given:
        position = on.position[slot.index]
        tall = on.tables.kinds[position].shape == TALL
        for left, right, first in one.parts:
            height = left.shape[1]
            where = (left.data_ptr(), left.stride(0), right.data_ptr(), right.stride(0), len(left), first, height)
            rows.append((position, *where, int(tall)))  # as in kernels/products.py
            most, sides = max(most, len(left)), max(sides, height if tall else slot.cols)
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=on.pinned).to(on.device, non_blocking=True)
    positions = torch.tensor([on.position[slot.index] for slot, _ in given], pin_memory=on.pinned)
    return Prepared(
        given,
        table,
        positions.to(on.device, non_blocking=True),
        torch.stack([one.squares for _, one in given]).float(),
        torch.empty(len(rows), most, dtype=torch.float32, device=on.device),
        sides,
    )


def decide(on: CudaBackend, prepared: Prepared) -> None:
    """Moments and factors of all of them. Raises nothing: a norm that is not finite is noted as any other is."""
    (count, most), (height, width) = prepared.along.shape, on.tiling.factor
    on.statistics[columns.SQUARES.value].index_copy_(0, prepared.positions, prepared.squares)
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
