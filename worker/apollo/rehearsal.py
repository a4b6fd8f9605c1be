"""Steps on tensors that nobody needs, so that every kernel of a step is compiled before the first real one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from worker.apollo.launch_tables import Kind, kind_of
from worker.apollo.parameters import Slot


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
