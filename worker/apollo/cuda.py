"""APOLLO-Mini on CUDA: lays out the tables, launches the kernels, and never waits for the device.

In the steady state (same gradient tensors) a burst is about a dozen launches and allocates nothing; streaming takes as
many for every bucket of gradients. The host waits only where P is redrawn, which is also where it needs the true step
count, and in `check` and `totals`.

Scratch memory besides the state: the projections, R in partial sums, the tile tables; for a 27B model about 150 MB.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from worker.apollo import formulas, philox
from worker.apollo.errors import ApolloError, NonFiniteGradientError
from worker.apollo.kernels import columns, decide, measure, write
from worker.apollo.launch_tables import SMALL, TALL, UNIT, Known, Run, Tiling, build, cut, is_aligned, merge
from worker.apollo.parameters import Options, Slot, Totals
from worker.apollo.state_layout import StateArea

TRITON = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
LANES = 4096
"""Width of the small reductions: a program's loads at a time."""

assert columns.NORM_EPS.value == formulas.NORM_EPS
assert columns.LIMITER_FLOOR.value == formulas.LIMITER_FLOOR


class CudaBackend:
    """See `slots.Backend`."""

    def __init__(self, slots: Sequence[Slot], area: StateArea, options: Options, tiling: Tiling | None = None) -> None:
        self.area, self.options, self.tiling = area, options, tiling or Tiling()
        self.device = area.memory.device
        self.pinned = self.device.type == "cuda"
        self.groups = _groups(slots)
        numbers = {id(group): number for number, group in enumerate(self.groups)}
        self.tables = build(slots, [numbers[id(slot.group)] for slot in slots], area, self.tiling)
        self.position = {slot.index: i for i, slot in enumerate(self.tables.slots)}
        self._allocate()
        self._drawn: int | None = None
        self._bound: list[tuple[int, ...]] = [()] * len(slots)
        self._known = Known(())
        self._runs: list[Run] = []
        self._copies: list[Tensor] = []
        self._knobs: list[tuple[float, ...]] = [()] * len(self.groups)
        self._scales: list[object] = []

    def _allocate(self) -> None:
        tables, count = self.tables, len(self.tables.slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.parameters = tables.parameters.to(self.device)
        self.tiles, self.out_tiles = tables.tiles.to(self.device), tables.out_tiles.to(self.device)
        self.chunks = tables.chunks.to(self.device)
        self.bindings = zeros(count, columns.BINDINGS.value, dtype=torch.int64)
        self.knobs = zeros(len(self.groups), columns.KNOBS.value, dtype=torch.float64)
        self.roots = zeros(count, dtype=torch.float64)
        self.projections = zeros(tables.projections[-1])
        self.scratch = zeros(tables.scratch)
        self.partial_squares = zeros(len(tables.tiles))
        self.partial_weights, self.partial_moved = zeros(len(tables.out_tiles)), zeros(len(tables.out_tiles))
        self.partial_norms = zeros(len(tables.chunks), 2)
        self.statistics = zeros(columns.STATISTICS.value, count)
        self.weight_squares = zeros(count)
        self.control = zeros(columns.CONTROLS.value, dtype=torch.int64)
        self.told = torch.zeros(columns.CONTROLS.value, dtype=torch.int64, pin_memory=self.pinned)

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
            self._draw(draw)
        for number, group in enumerate(self.groups):
            self._set_knobs(number, group, step_scale)
        scales = [group["scale"] for group in self.groups]
        if scales != self._scales:
            self._scales = scales
            self.roots.copy_(torch.tensor([slot.root for slot in self.tables.slots], dtype=torch.float64))

    def open(self) -> None:
        self.control[columns.BAD.value].zero_()
        self.statistics.zero_()

    def update(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        if not self._known.matches(pairs):
            self._runs = self._bind(pairs)
        self.sweep(self._runs)

    def sweep(self, runs: Sequence[Run]) -> None:
        """All launches of an update. First everything is measured and judged; only then is anything written."""
        spans = merge(runs)
        for run in runs:
            self._measure(run)
        for first, last in spans:
            self._total(first, last, columns.TILE, columns.TILES, self.partial_squares, self.statistics[0])
        for first, last in spans:
            decide.judge[(1,)](
                self.parameters, first, last - first, self.statistics, self.control, BLOCK=LANES, num_warps=8
            )
        for first, last in merge([run for run in runs if run[2].shape != SMALL]):
            self._factors(first, last)
        for run in runs:
            self._write(run)

    def finish(self) -> None:
        decide.finish[(1,)](self.area.step_count, self.control, num_warps=1)
        self.told.copy_(self.control, non_blocking=True)
        self._copies.clear()

    def capture(self, pairs: Sequence[tuple[Slot, Tensor]]) -> Callable[[], None]:
        runs = self._bind(pairs)
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
                self._bind(pairs)
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
        count = len(self.tables.slots)
        out = columns.OUT_TILE, columns.OUT_TILES
        self._total(0, count, *out, self.partial_weights, self.weight_squares)
        small = [i for i, kind in enumerate(self.tables.kinds) if kind.shape == SMALL]
        moved = self.statistics[columns.MOVED.value]
        if small:  # they come last
            self._total(small[0], count, *out, self.partial_moved, moved)
        written = self.statistics[columns.WRITTEN.value].cpu() > 0
        elements = torch.tensor([slot.rows * slot.cols for slot in self.tables.slots])
        return Totals(
            float(moved.cpu().double()[written].sum()),
            float(self.weight_squares.cpu().double()[written].sum()),
            int(elements[written].sum()),
        )

    # -- what the host keeps up to date ---------------------------------------------------------------------------

    def _draw(self, draw: int) -> None:
        """Draw every P on the CPU and send them up in one copy."""
        host = torch.zeros(self.projections.shape, pin_memory=self.pinned)
        for slot, (start, end) in zip(self.tables.slots, pairwise(self.tables.projections), strict=True):
            if end > start:
                p = self.options.draw(slot, draw)
                host[start : start + len(p)] = p
        self.projections.copy_(host, non_blocking=True)
        self._drawn = draw

    def _set_knobs(self, number: int, group: dict[str, Any], step_scale: float) -> None:
        """Changed values go up as arguments of a fill: no copy, no wait."""
        rate, (beta1, beta2) = formulas.learning_rate(group["lr"], step_scale), group["betas"]
        values = (rate, beta1, beta2, group["eps"], rate * group["weight_decay"], group["scale_front"], group["gamma"])
        known = self._knobs[number] or (None,) * len(values)
        for i, (value, old) in enumerate(zip(values, known, strict=True)):
            if value != old:
                self.knobs[number, i].fill_(float(value))
        self._knobs[number] = values

    def _bind(self, pairs: Sequence[tuple[Slot, Tensor]]) -> list[Run]:
        """Tell the device where these weights and gradients lie; return the launches they need."""
        entries, dtypes = {}, {}
        for slot, gradient in pairs:
            position = self.position[slot.index]
            entries[position] = (*self._weight(position, slot), *self._gradient(position, slot, gradient))
            dtypes[position] = gradient.dtype
        changed = [position for position in entries if entries[position] != self._bound[position]]
        for position in changed:
            self._bound[position] = entries[position]
        if len(changed) > 4:
            rows = [entry or (0, 0, 0, 0) for entry in self._bound]
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=self.pinned)
            self.bindings.copy_(host, non_blocking=True)
        else:
            for position in changed:
                for column, value in enumerate(entries[position]):
                    self.bindings[position, column].fill_(value)
        self._known = Known(() if self._copies else pairs)  # a copy has to be made again
        return cut({position: (self.tables.kinds[position], dtype) for position, dtype in dtypes.items()})

    def _weight(self, position: int, slot: Slot) -> tuple[int, int]:
        """Address and row stride."""
        address = slot.parameter.data_ptr()
        if self._bound[position] and address == self._bound[position][0]:
            return address, self._bound[position][1]
        weight = slot.matrix(slot.parameter, "the weight")
        if self.tables.kinds[position].aligned and not is_aligned(weight):
            raise ApolloError(f"{slot.name} moved to an address that is not a multiple of 16 bytes")
        return address, weight.stride(0)

    def _gradient(self, position: int, slot: Slot, tensor: Tensor) -> tuple[int, int]:
        """Address and row stride. A gradient whose rows do not start at multiples of 16 bytes is copied if need be."""
        if tensor.is_contiguous() and tensor.dtype in TRITON and tensor.shape == slot.parameter.shape:
            gradient, stride = tensor, slot.cols
        else:
            gradient = slot.matrix(tensor, "the gradient")
            stride = gradient.stride(0)
        if self.tables.kinds[position].aligned and (gradient.data_ptr() % 16 or stride % UNIT):
            gradient, stride = gradient.clone(memory_format=torch.contiguous_format), slot.cols
            self._copies.append(gradient)  # alive until the step's launches are queued
        return gradient.data_ptr(), stride

    # -- launches -------------------------------------------------------------------------------------------------

    def _measure(self, run: Run) -> None:
        first, last, kind, dtype = run
        tile, end = self.tables.tile_starts[first], self.tables.tile_starts[last]
        where = (self.parameters, self.bindings, self.tiles, tile)
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

    def _total(
        self, first: int, last: int, start: tl.constexpr, count: tl.constexpr, partials: Tensor, totals: Tensor
    ) -> None:
        decide.total[(last - first,)](
            self.parameters, first, partials, totals, START=start, COUNT=count, BLOCK=LANES, num_warps=8
        )

    def _factors(self, first: int, last: int) -> None:
        chunk, end = self.tables.chunk_starts[first], self.tables.chunk_starts[last]
        decide.update_moments[(end - chunk,)](
            self.parameters, self.chunks, chunk, self.knobs, self.scratch, self.statistics, self.partial_norms,
            self.control, BLOCK=self.tiling.chunk, num_warps=4,
        )  # fmt: skip
        decide.matrix_factor[(last - first,)](
            self.parameters, first, len(self.tables.slots), self.knobs, self.roots, self.area.step_count,
            self.area.previous, self.statistics, self.partial_norms, self.control, BLOCK=256, num_warps=2,
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
                *data, low, high, **types, ALIGNED=kind.aligned, TR=total, BR=height, BC=width,
                num_warps=self.tiling.out_warps,
            )  # fmt: skip


def _groups(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for slot in slots:
        if not any(slot.group is group for group in groups):
            groups.append(slot.group)
    return groups
