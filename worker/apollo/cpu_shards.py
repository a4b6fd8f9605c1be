"""On a CPU, what is added up over the processes that hold shards, in an update.

    gradients     ||G||^2 of every shard, and R where the side that is projected away is divided
    norms         ||N||^2 and ||R||^2 where the side that is kept is divided

Invariant: every process adds up the same numbers of the same parameters in the same order; what is whole here is left
as it is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.apollo.cpu_factored import Sums
from worker.apollo.parameters import Slot, SumOverShards

Measured = tuple[Tensor | Sums | None, float]
"""Of a gradient: (R, ||G||); the factored rule's sums in place of R, nothing for AdamW."""


def gradients(slots: Sequence[Slot], measured: list[Measured], add_up: SumOverShards | None) -> list[Measured]:
    """What was measured of each slot's gradient, over all processes: R in place, and the whole matrix's ||G||."""
    if add_up is None:
        return measured
    squares = [norm**2 if slot.shard else 0.0 for slot, (_, norm) in zip(slots, measured, strict=True)]
    total = torch.tensor(squares, dtype=torch.float64)
    projected = [r for slot, (r, _) in zip(slots, measured, strict=True) if isinstance(r, Tensor) and slot.sums_r]
    add_up([total, *projected])
    return [
        (found, math.sqrt(square) if slot.shard and square >= 0 else square if slot.shard else norm)
        for slot, (found, norm), square in zip(slots, measured, total.tolist(), strict=True)
    ]


def norms(
    slots: Sequence[Slot], found: dict[int, tuple[float, float]], add_up: SumOverShards | None
) -> dict[int, tuple[float, float]]:
    """(||N||, ||R||) by the slot's index, of the whole matrix of each."""
    if add_up is None:
        return found
    parts = [slot.index for slot in slots if slot.sums_norms]
    total = torch.tensor([found[index] for index in parts], dtype=torch.float64).view(-1, 2).square_()
    add_up([total])
    return found | {index: (a, b) for index, (a, b) in zip(parts, total.sqrt().tolist(), strict=True)}
