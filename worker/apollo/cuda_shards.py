"""On CUDA, what is added up over the processes that hold shards: three times an update, and once a step.

    squares_and_r     ||G||^2 of every shard, and R where the side that is projected away is divided; before `judge`
    norms             ||N||^2 and ||R||^2 where the side that is kept is divided; before `matrix_factor`
    totals            what a step moved and weighed, for the log

Invariant: every process adds up the same numbers of the same parameters in the same order; what is whole here is left
as it is. The host waits for nothing that the sum itself does not wait for.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from worker.apollo.device_tables import DeviceTables
from worker.apollo.kernels import columns
from worker.apollo.launch_tables import SMALL, Run
from worker.apollo.parameters import SumOverShards


class ShardSums:
    """Of the parameters of `tables`, which has some shards."""

    def __init__(self, tables: DeviceTables, add_up: SumOverShards) -> None:
        self._tables, self._add_up = tables, add_up
        self._known: dict[tuple[int, ...], _Places] = {}
        self._all = self._places(range(len(tables.tables.slots)))

    def squares_and_r(self, runs: Sequence[Run]) -> None:
        """Before anything is judged by ||G||."""
        places = self._of(runs)
        squares = self._tables.statistics[columns.SQUARES.value]
        total = squares[places.shards]
        parts = [self._tables.scratch[start:end].view(count, -1) for start, end, count in places.r]
        sums = [part.sum(0) for part in parts]
        self._add_up([total, *sums])
        squares[places.shards] = total
        for part, one in zip(parts, sums, strict=True):
            part[0] = one
            part[1:] = 0

    def norms(self, runs: Sequence[Run]) -> None:
        """Before a factor is made of ||N|| and ||R||."""
        places = self._of(runs)
        norms = self._tables.partial_norms
        total = torch.zeros(places.kept, 2, dtype=torch.float64, device=norms.device)
        total.index_add_(0, places.owners, norms[places.chunks].double())
        self._add_up([total])
        norms[places.chunks] = 0
        norms[places.first_chunks] = total.float()

    def totals(self, moved: Tensor, weights: Tensor) -> None:
        """In place: of small shards what a step moved, of all what they weighed."""
        small, every = self._all.small, self._all.shards
        parts = [moved[small], weights[every]]
        self._add_up(parts)
        moved[small], weights[every] = parts

    def _of(self, runs: Sequence[Run]) -> "_Places":
        key = tuple(number for first, last, *_ in runs for number in (first, last))
        if key not in self._known:
            self._known[key] = self._places([i for first, last in zip(key[::2], key[1::2], strict=True)
                                             for i in range(first, last)])  # fmt: skip
        return self._known[key]

    def _places(self, positions: Sequence[int]) -> "_Places":
        return _Places(self._tables, [i for i in positions if self._tables.tables.slots[i].shard is not None])


class _Places:
    """Where the numbers of the shards at `positions` lie: by the order of their names, which all processes share."""

    def __init__(self, of: DeviceTables, positions: list[int]) -> None:
        tables, device = of.tables, of.device
        positions = sorted(positions, key=lambda i: tables.slots[i].index)

        def index(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        self.shards = index(positions)
        self.small = index([i for i in positions if tables.kinds[i].shape == SMALL])
        matrices = [i for i in positions if tables.kinds[i].shape != SMALL]
        self.r: list[tuple[int, int, int]] = []
        """(start, end, parts) in the scratch memory."""
        for i in matrices:
            if tables.slots[i].sums_r:
                row = tables.parameters[i].tolist()
                start, count = row[columns.SCRATCH.value], row[columns.PARTS.value]
                self.r.append((start, start + count * tables.slots[i].kept, count))
        chunks = list(pairwise(tables.chunk_starts))
        kept = [i for i in matrices if tables.slots[i].sums_norms]
        self.kept = len(kept)
        self.chunks = index([chunk for i in kept for chunk in range(*chunks[i])])
        self.first_chunks = index([chunks[i][0] for i in kept])
        self.owners = index([number for number, i in enumerate(kept) for _ in range(*chunks[i])])
