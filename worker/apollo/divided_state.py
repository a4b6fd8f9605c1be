"""The state of an optimizer that is divided over processes, as one process has it: put together, and taken apart again.

    whole = put_together(areas, shapes, parts)      # what a checkpoint keeps, whatever the number of processes
    take_apart(whole, areas, shapes, parts)         # back into every process's own area

`areas`: the flat state memory of each process; `shapes`: of the whole tensors, in the optimizer's order; `parts`: for
each tensor, which part each process holds (None: all of it). For matrices that take APOLLO and the rest AdamW.

Must not know: Redis, vLLM.
Invariants: what every process holds in full is the same on each, so the first one's is taken. Put together and taken
apart, every area has the bits that it had.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from worker.apollo.state_layout import APOLLO, HEADER_BYTES, Layout, StateArea, algorithm_for, state_bytes
from worker.utils.shard import Shard

Parts = Sequence[Sequence[Shard | None]]
"""By tensor, then by process."""


def put_together(areas: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], parts: Parts) -> Tensor:
    """The whole state, uint8 on the host; all zero where no process has one yet. Raises `ApolloError` where an area is
    of other parameters."""
    memory = torch.zeros(state_bytes(list(shapes)), dtype=torch.uint8)
    ours = [area.cpu() for area in areas]
    if not ours[0][:HEADER_BYTES].any():
        return memory
    whole, divided = StateArea(memory, Layout.of(shapes)), _areas(ours, shapes, parts)
    for target, sources in _vectors(whole, divided, shapes, parts):
        for source, shard in sources:
            if shard is None:
                target.copy_(source.view(target.shape))
                break
            shard.put(source.view(shard.local), target)
    whole.step_count.copy_(divided[0].step_count)
    whole.previous.copy_(divided[0].previous)
    return memory


def take_apart(whole: Tensor, areas: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], parts: Parts) -> None:
    """Write the whole state into every area. Raises `ApolloError` where it is of other parameters."""
    if not whole[:HEADER_BYTES].any():
        for area in areas:
            area.zero_()
        return
    made = [torch.zeros(area.shape, dtype=torch.uint8) for area in areas]
    source, divided = StateArea(whole, Layout.of(shapes)), _areas(made, shapes, parts)
    for value, targets in _vectors(source, divided, shapes, parts):
        for target, shard in targets:
            target.copy_((value if shard is None else shard.of(value)).reshape(-1))
    for one, area, memory in zip(divided, areas, made, strict=True):
        one.step_count.copy_(source.step_count)
        one.previous.copy_(source.previous)
        area.copy_(memory)


def _areas(memories: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], parts: Parts) -> list[StateArea]:
    found = []
    for rank, memory in enumerate(memories):
        shards = [part[rank] for part in parts]
        held = [shape if shard is None else shard.local for shape, shard in zip(shapes, shards, strict=True)]
        found.append(StateArea(memory, Layout.of(held, shards=shards)))
    return found


def _vectors(
    whole: StateArea, divided: Sequence[StateArea], shapes: Sequence[tuple[int, ...]], parts: Parts
) -> Iterator[tuple[Tensor, list[tuple[Tensor, Shard | None]]]]:
    """Every moment: the whole one, in the shape that its parts divide, and each process's, which is 1-D, with the part
    that it is."""
    for index, (shape, part) in enumerate(zip(shapes, parts, strict=True)):
        kept = _kept(shape)
        for moment in (0, 1):
            target = whole.moments(index)[moment]
            sources = [area.moments(index)[moment] for area in divided]
            if kept is None:  # AdamW: as the parameter
                yield target.view(shape), list(zip(sources, part, strict=True))
            else:
                along = [None if one is None or one.dim != kept else _vector(one, kept) for one in part]
                yield target, list(zip(sources, along, strict=True))


def _kept(shape: Sequence[int]) -> int | None:
    """Along which side of a matrix APOLLO has moments; None for what takes AdamW."""
    if algorithm_for(shape) != APOLLO:
        return None
    return 0 if shape[0] >= shape[1] else 1


def _vector(shard: Shard, dim: int) -> Shard:
    return Shard((shard.shape[dim],), 0, shard.pieces)
