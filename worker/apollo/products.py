"""A gradient that is known as a product, G = left^T right, before it is formed, and what a device makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from torch import Tensor

from worker.apollo.errors import ApolloError

if TYPE_CHECKING:
    from worker.apollo.parameters import Slot

Part = tuple[Tensor, Tensor, int]
"""(left [T, rows of this part], right [T, cols], the first of its rows): each part is of other rows of the matrix."""

ALONE = "on a CPU a step is decided from gradients alone: takes_product() said so"


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


class FromProducts(Protocol):
    """What of a `Backend` decides a step from products: `decide_products` right after `begin`, then `write`."""

    def takes_product(self, slot: Slot, parts: Sequence[Part]) -> bool:
        """Whether a step can be decided from these products, before the gradient is formed."""

    def prepare_products(self, given: Sequence[tuple[Slot, GradientProduct]]) -> Any:
        """What `decide_products` will need of them."""

    def decide_products(self, prepared: Any) -> None:
        """Decide what these matrices are moved by, before any other of the step, or, if a norm is not finite, report
        it."""

    def write(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        """Move matrices of which that was decided by their gradients. Raises `ApolloError` for any other."""


class FromGradientsAlone:
    """Of a device that decides from gradients: it takes no product."""

    def takes_product(self, slot: Slot, parts: Sequence[Part]) -> bool:
        return False

    def prepare_products(self, given: Sequence[tuple[Slot, GradientProduct]]) -> NoReturn:
        raise ApolloError(ALONE)

    def decide_products(self, prepared: Any) -> NoReturn:
        raise ApolloError(ALONE)

    def write(self, pairs: Sequence[tuple[Slot, Tensor]]) -> NoReturn:
        raise ApolloError(ALONE)
