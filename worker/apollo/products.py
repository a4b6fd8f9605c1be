"""A gradient that is known as a product, G = left^T right, before it is formed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Part = tuple[Tensor, Tensor, int]
"""(left [T, rows of this part], right [T, cols], the first of its rows): each part is of other rows of the matrix."""


@dataclass(frozen=True)
class GradientProduct:
    """Of one matrix. Nothing of it may change, or move, before it is applied."""

    weight: Tensor
    parts: Sequence[Part]
    squares: Tensor
    """||G||^2, a scalar on the weight's device."""


def covers(parts: Sequence[Part], rows: int) -> bool:
    """Whether each of `rows` is in one part, and in one alone."""
    end = 0
    for left, _, first in sorted(parts, key=lambda part: part[2]):
        if first != end:
            return False
        end = first + left.shape[1]
    return end == rows
