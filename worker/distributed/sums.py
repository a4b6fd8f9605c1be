"""Sums of tensors over the members of a group.

    sum_in_order(group, tensors, places)     each of `tensors` becomes its sum over the members at `places`
    begin_sum(group, tensors, places)        the same, under way on a GPU while it computes something else

Must not know: Redis, vLLM, versions, the optimizer.
Invariants: every member has the same bits afterwards. On a CPU the sum is ((a + b) + c) ... in the order of places,
each addition rounded to the tensors' dtype: what one process gets that adds the same parts in that order. On a GPU NCCL
chooses the order, the same one for every member.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from worker.distributed.group import Group

BLOCK = 32 * 2**20
"""Bytes that are exchanged at once on a CPU; every member's are held at the same time."""


def sum_in_order(group: Group, tensors: Sequence[Tensor], places: Sequence[int]) -> None:
    """In place. places: who has a part, ascending; what other members' tensors hold does not count. All members give
    tensors of the same shapes and dtypes, in the same order."""
    if (wait := begin_sum(group, tensors, places)) is not None:
        wait()


def begin_sum(group: Group, tensors: Sequence[Tensor], places: Sequence[int]) -> Callable[[], None] | None:
    """As `sum_in_order`. On a GPU: what has to be called before the sums are used. None: they are there."""
    if tensors and tensors[0].is_cuda:
        if group.place not in places:
            for tensor in tensors:
                tensor.zero_()
        return group.add_later(tensors)
    for block in _blocks(tensors):
        parts = group.all_of(torch.cat([tensor.reshape(-1) for tensor in block]))
        total = parts[places[0]]
        for place in places[1:]:
            total += parts[place]
        start = 0
        for tensor in block:
            tensor.copy_(total[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
    return None


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, at least one and at most `BLOCK` bytes together."""
    block: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if block and (size + tensor.nbytes > BLOCK or tensor.dtype != block[0].dtype):
            yield block
            block, size = [], 0
        block.append(tensor)
        size += tensor.nbytes
    if block:
        yield block
