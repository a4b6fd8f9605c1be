"""Which slots a parameter has: itself, or the matrices of its stack.

Invariant: parameters and slots are in the order in which the optimizer was given them.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from worker.apollo.errors import ApolloError
from worker.apollo.parameters import Slot
from worker.apollo.state_layout import Layout


class SlotTable:
    """Of `slots`, those of one parameter side by side."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots: dict[int, list[Slot]] = {}
        for slot in slots:
            self._slots.setdefault(id(slot.parameter), []).append(slot)
        self._firsts = [found[0] for found in self._slots.values()]
        self.parameters = [first.parameter for first in self._firsts]

    def layout(self) -> Layout:
        """Of their state."""
        shapes, algorithms = [p.shape for p in self.parameters], [first.algorithm for first in self._firsts]
        return Layout.of(shapes, algorithms, shards=[first.shard for first in self._firsts])

    def pairs(self, given: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Slot, Tensor]]:
        """Every slot of these parameters, with the gradient of the whole parameter. Raises `ApolloError` for a tensor
        that is none of them."""
        if any(id(parameter) not in self._slots for parameter, _ in given):
            raise ApolloError("update() was given a tensor that is not one of the optimizer's parameters")
        return [(slot, gradient) for parameter, gradient in given for slot in self._slots[id(parameter)]]

    def first(self, parameter: Tensor) -> Slot:
        """The slot of this parameter, or the first of its stack."""
        return self._slots[id(parameter)][0]

    def name_of(self, parameter: Tensor) -> str:
        """As the optimizer was told it."""
        first = self.first(parameter)
        return first.name if first.part is None else first.name.removesuffix("[0]")

    def trained(self) -> list[Tensor]:
        """The parameters that get gradients."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def whole_bytes(self, parameter: Tensor) -> int:
        """Of a gradient; of a shard's, the whole's, so that all processes fill their buckets alike."""
        first = self.first(parameter)
        whole = parameter.numel() if first.shard is None else math.prod(first.whole)
        return whole * parameter.element_size()
