"""Steps on tensors that nobody needs, so that every kernel of a step is compiled before the first real one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from worker.apollo.launch_tables import UNIT, Kind, kind_of
from worker.apollo.parameters import Slot
from worker.apollo.products import GradientProduct


def rehearse(slots: Sequence[Slot], make: Callable[[list[dict[str, Any]]], Any]) -> None:
    """The smallest parameter of each kind of launch stands for all of them. make: an optimizer over such groups."""
    smallest: dict[Kind, Slot] = {}
    for slot in sorted(slots, key=lambda slot: slot.rows * slot.cols, reverse=True):
        smallest[kind_of(slot)] = slot
    tensors = [
        torch.zeros(slot.parameter.shape if slot.part is None else (slot.rows, slot.cols)).to(slot.parameter)
        for slot in smallest.values()
    ]
    groups = [
        {"params": [tensor], "algorithm": slot.algorithm}
        for slot, tensor in zip(smallest.values(), tensors, strict=True)
    ]
    twin = make(groups)
    for _ in range(2):  # the second step goes the way of all later ones
        twin.step(grads=[torch.zeros_like(tensor) for tensor in tensors])
        twin.last_update.weight_rms  # noqa: B018  (the totals are launches too)
    _rehearse_products(twin, tensors)


def _rehearse_products(twin: Any, tensors: Sequence[Tensor]) -> None:
    given = []
    for weight in tensors:
        if weight.dim() == 2:
            left, right = (torch.zeros(UNIT, side, dtype=weight.dtype, device=weight.device) for side in weight.shape)
            if twin.takes_product(weight, [(left, right, 0)]):
                given.append(GradientProduct(weight, [(left, right, 0)], torch.zeros((), device=weight.device)))
    if given:
        twin.begin()
        twin.decide_products(twin.prepare_products(given))
        twin.finish()
