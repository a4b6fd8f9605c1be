"""A step on CUDA: launches the kernels over device_tables.py's tables, and never waits for the device.

In the steady state (same gradient tensors) a burst is about a dozen launches and allocates nothing; streaming takes as
many for every bucket of gradients. The host waits only where P is redrawn, which is also where it needs the true step
count, and in `check` and `totals`.

Scratch memory besides the state: the projections, R in partial sums, the tile tables; for a 27B model about 150 MB. The
factored rule keeps at most 134 MB of partial sums, and three numbers a row or column.
"""

import math
from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from worker.apollo import cuda_factored, cuda_products, formulas, philox
from worker.apollo.cuda_shards import ShardSums
from worker.apollo.device_tables import DeviceTables
from worker.apollo.errors import ApolloError, NonFiniteGradientError
from worker.apollo.kernels import columns, decide, measure, write
from worker.apollo.kernels.common import TRITON
from worker.apollo.launch_tables import FACTORED, SMALL, TALL, WIDE, Run, Tiling, merge
from worker.apollo.parameters import Options, Slot, Totals
from worker.apollo.products import GradientProduct, Part
from worker.apollo.state_layout import StateArea

LANES = 4096
"""Width of the small reductions: a program's loads at a time."""

assert columns.NORM_EPS.value == formulas.NORM_EPS
assert columns.LIMITER_FLOOR.value == formulas.LIMITER_FLOOR


class CudaBackend(DeviceTables):
    """See `parameters.Backend`."""

    def __init__(self, slots: Sequence[Slot], area: StateArea, options: Options, tiling: Tiling | None = None) -> None:
        super().__init__(slots, area, options, tiling)
        self._shards: ShardSums | None = None
        self._untouched = False
        self._decided: frozenset[int] = frozenset()
        if any(slot.shard is not None for slot in slots):
            if options.sum_over_shards is None:
                raise ApolloError("parameters are shards, and no sum_over_shards says what the others hold")
            self._shards = ShardSums(self, options.sum_over_shards)

    def order(self) -> Sequence[Slot]:
        return self.tables.slots

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin(self, draw: int, step_scale: float) -> None:
        self.prepare(draw, step_scale)
        self.open()

    def prepare(self, draw: int, step_scale: float = 1.0) -> None:
        """What the host decides: the projections and the hyper-parameters. Reports a refused step it has heard of."""
        if self.pinned and torch.cuda.current_device() != self.device.index:
            raise ApolloError(f"the parameters are on {self.device}: make it current with torch.cuda.set_device")
        if draw != self._drawn or int(self.told[columns.UNTOLD.value]):
            self.check()
        if draw != self._drawn:
            self.draw(draw)
        for number, group in enumerate(self.groups):
            self.set_knobs(number, group, step_scale)
        scales = [group["scale"] for group in self.groups]
        if scales != self._scales:
            self._scales = scales
            self.roots.copy_(torch.tensor([slot.root for slot in self.tables.slots], dtype=torch.float64))

    def open(self) -> None:
        self.control[columns.BAD.value].zero_()
        self.statistics.zero_()
        self._untouched, self._decided = True, frozenset()

    def takes_product(self, slot: Slot, parts: Sequence[Part]) -> bool:
        return self._shards is None and cuda_products.takes(self, slot, parts)

    def prepare_products(self, given: Sequence[tuple[Slot, GradientProduct]]) -> cuda_products.Prepared:
        return cuda_products.prepare(self, given)

    def decide_products(self, prepared: cuda_products.Prepared) -> None:
        if not self._untouched:
            raise ApolloError("products are the first part of a step")
        self._untouched, self._decided = False, frozenset(slot.index for slot, _ in prepared.given)
        cuda_products.decide(self, prepared)

    def write(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        for slot, _ in pairs:
            if slot.index not in self._decided:
                raise ApolloError(f"{slot.name} is written, and decide_products() was not given its products")
        for run in self.bind(pairs):
            self._write(run)

    def update(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        self._untouched = False
        if not pairs or not self._known.matches(pairs):
            self.bind(pairs)
        self.sweep(self._runs)

    def sweep(self, runs: Sequence[Run]) -> None:
        """All launches of an update. First everything is measured and judged; only then is anything written."""
        spans = merge(runs)
        for run in runs:
            self._measure(run)  # of the factored rule, in the order of its windows
        for first, last in spans:
            self.total(first, last, columns.TILE, columns.TILES, self.partial_squares, self.statistics[0])
        if self._shards is not None:
            self._shards.squares_and_r(runs)
        for first, last in spans:
            self._judge(first, last)
        matrices = merge([run for run in runs if run[2].shape in (TALL, WIDE)])
        for first, last in matrices:
            self._moments(first, last)
        if self._shards is not None:
            self._shards.norms(runs)
        for first, last in matrices:
            self._factors(first, last)
        cuda_factored.decide(self, [run for run in runs if run[2].shape == FACTORED])
        for run in runs:
            self._write(run)

    def finish(self) -> None:
        if self._shards is not None:  # now, and not when they are asked for: all processes add up
            self._total_step()
            self._shards.totals(self.statistics[columns.MOVED.value], self.weight_squares)
        decide.finish[(1,)](self.area.step_count, self.control, num_warps=1)
        self.told.copy_(self.control, non_blocking=True)
        self._copies.clear()

    def capture(self, pairs: Sequence[tuple[Slot, Tensor]]) -> Callable[[], None]:
        if self._shards is not None:
            raise ApolloError("capture() does not know sums over processes: parameters are shards")
        runs = self.bind(pairs)
        if self._copies:
            raise ApolloError("a captured step needs gradients whose rows start at multiples of 16 bytes")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.open()
            self.sweep(runs)
            self.finish()
        known = self._known

        def replay() -> None:
            if self._known is not known:  # other gradients were applied in between
                self.bind(pairs)
                self._known = known
            graph.replay()

        return replay

    def check(self) -> None:
        bad = int(self.control[columns.UNTOLD.value])  # waits for the device
        if bad:
            self.control.zero_()
            self.told.zero_()
            raise NonFiniteGradientError(next(s.name for s in self.tables.slots if s.index == bad - 1))

    def totals(self) -> Totals:
        self.check()
        if self._shards is None:
            self._total_step()
        written = self.statistics[columns.WRITTEN.value].cpu() > 0
        elements = torch.tensor([math.prod(slot.whole) for slot in self.tables.slots])
        return Totals(
            float(self.statistics[columns.MOVED.value].cpu().double()[written].sum()),
            float(self.weight_squares.cpu().double()[written].sum()),
            int(elements[written].sum()),
        )

    def _total_step(self) -> None:
        """What every parameter moved and weighed, from its tiles."""
        count = len(self.tables.slots)
        out = columns.OUT_TILE, columns.OUT_TILES
        self.total(0, count, *out, self.partial_weights, self.weight_squares)
        small = [i for i, kind in enumerate(self.tables.kinds) if kind.shape == SMALL]
        if small:  # they come last
            self.total(small[0], count, *out, self.partial_moved, self.statistics[columns.MOVED.value])

    # -- launches -------------------------------------------------------------------------------------------------

    def _measure(self, run: Run) -> None:
        first, last, kind, dtype = run
        tile, end = self.tables.tile_starts[first], self.tables.tile_starts[last]
        where = (self.parameters, self.bindings, self.tiles, tile)
        if kind.shape == FACTORED:
            cuda_factored.measure(self, run)
            return
        if kind.shape == SMALL:
            measure.square[(end - tile,)](
                *where, self.partial_squares, G_TYPE=TRITON[dtype], BLOCK=self.tiling.small, num_warps=4
            )
            return
        data = (*where, self.projections, self.scratch, self.partial_squares)
        if kind.shape == TALL:
            height, width = self.tiling.tall
            measure.project_tall[(end - tile,)](
                *data, G_TYPE=TRITON[dtype], ALIGNED=kind.aligned, BR=height, BC=width, num_warps=self.tiling.tall_warps
            )
        else:
            total, height, width = self.tiling.wide
            measure.project_wide[(end - tile,)](
                *data, G_TYPE=TRITON[dtype], ALIGNED=kind.aligned, TR=total, BR=height, BC=width,
                num_warps=self.tiling.wide_warps,
            )  # fmt: skip

    def total(
        self, first: int, last: int, start: tl.constexpr, count: tl.constexpr, partials: Tensor, totals: Tensor
    ) -> None:
        decide.total[(last - first,)](
            self.parameters, first, partials, totals, START=start, COUNT=count, BLOCK=LANES, num_warps=8
        )

    def decide(self, first: int, last: int) -> None:
        """Of matrices whose squared norm and R are there: judge, moments, factors."""
        self._judge(first, last)
        self._moments(first, last)
        self._factors(first, last)

    def _judge(self, first: int, last: int) -> None:
        decide.judge[(1,)](
            self.parameters, first, last - first, self.statistics, self.control, BLOCK=LANES, num_warps=8
        )

    def _moments(self, first: int, last: int) -> None:
        chunk, end = self.tables.chunk_starts[first], self.tables.chunk_starts[last]
        decide.update_moments[(end - chunk,)](
            self.parameters, self.chunks, chunk, self.knobs, self.scratch, self.statistics, self.partial_norms,
            self.control, BLOCK=self.tiling.chunk, num_warps=4,
        )  # fmt: skip

    def _factors(self, first: int, last: int) -> None:
        decide.matrix_factor[(last - first,)](
            self.parameters, first, len(self.tables.slots), self.knobs, self.roots, self.area.previous, self.statistics,
            self.partial_norms, self.control, BLOCK=256, num_warps=2,
        )  # fmt: skip

    def _write(self, run: Run) -> None:
        first, last, kind, dtype = run
        tile, end = self.tables.out_tile_starts[first], self.tables.out_tile_starts[last]
        where = (self.parameters, self.bindings, self.out_tiles, tile, len(self.tables.slots))
        data = (*where, self.knobs, self.area.step_count, self.statistics, self.partial_weights)
        low, high = philox.seed_words(self.options.seed)
        stochastic = self.options.stochastic and kind.dtype == torch.bfloat16
        types = {"G_TYPE": TRITON[dtype], "W_TYPE": TRITON[kind.dtype], "STOCHASTIC": stochastic}
        if kind.shape == SMALL:
            write.apply_adamw[(end - tile,)](
                *data, self.partial_moved, self.control, low, high, **types, BLOCK=self.tiling.small, num_warps=4
            )
        else:
            total, height, width = self.tiling.out
            write.apply[(end - tile,)](
                *data, low, high, self.sides, **types, ALIGNED=kind.aligned, SCALED=kind.shape == FACTORED,
                TR=total, BR=height, BC=width, num_warps=self.tiling.out_warps,
            )  # fmt: skip
