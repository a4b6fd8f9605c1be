"""The factored rule on a CPU: what one pass over a gradient finds, and what is left to be written.

Invariant: nothing changes the state but `keep`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.apollo import factored
from worker.apollo.parameters import Slot


@dataclass(frozen=True)
class Sums:
    """rows [n], cols [k]: the running means of G^2 after this step, fp32; weighted [k]: S of factored.py."""

    rows: Tensor
    cols: Tensor
    weighted: Tensor


@dataclass(frozen=True)
class Scaling:
    """U = size * rows[:, None] * G * cols; x_squares: ||X||^2, so that ||U|| is size times its root."""

    rows: Tensor
    cols: Tensor
    size: float
    x_squares: float


def measure(
    slot: Slot, kept: tuple[Tensor, Tensor], t: int, chunks: Iterable[tuple[slice, Tensor]]
) -> tuple[Sums, float]:
    """One pass over the gradient: (sums, ||G||). kept: r and c before. chunks: rows, and these in fp32, squared
    here in place."""
    beta2, eps = slot.group["betas"][1], slot.group["eps"]
    corrected = factored.correction(beta2, t)
    rows, sums = torch.zeros(slot.rows), torch.zeros(2, slot.cols)
    total = 0.0
    for part, g in chunks:
        squares = g.square_()
        in_rows = squares.sum(1)
        total += float(in_rows.double().sum())
        rows[part] = factored.follow(kept[0][part], in_rows.div_(slot.cols), beta2)
        weights = torch.ones(2, len(squares))
        weights[1] = factored.row_factors(rows[part], corrected, eps).square_()
        sums.addmm_(weights, squares)
    cols = factored.follow(kept[1], sums[0].div_(slot.rows), beta2)
    return Sums(rows, cols, sums[1]), math.sqrt(total) if total >= 0 else total  # NaN stays NaN


def keep(slot: Slot, kept: tuple[Tensor, Tensor], sums: Sums, t: int) -> Scaling:
    """Take the new means over into `kept`; by what the gradient is multiplied."""
    beta2, eps = slot.group["betas"][1], slot.group["eps"]
    corrected = factored.correction(beta2, t)
    kept[0].copy_(sums.rows)
    kept[1].copy_(sums.cols)
    rows = factored.row_factors(sums.rows, corrected, eps)
    cols = factored.column_factors(sums.cols, corrected, eps)
    x_squares = factored.squared_norm(cols, sums.weighted)
    mean_square = float(sums.rows.double().mean()) / corrected
    return Scaling(rows, cols, factored.matrix_factor(mean_square, x_squares, slot.rows * slot.cols), x_squares)
