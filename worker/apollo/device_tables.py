"""What the CUDA implementation keeps on the device, and keeps up to date: tables, hyper-parameters, projections, and
where weights and gradients lie.

Invariant: what has not changed is not sent again, and nothing here waits for the device.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from worker.apollo import formulas
from worker.apollo.errors import ApolloError
from worker.apollo.kernels import columns
from worker.apollo.launch_tables import UNIT, Known, Run, Tiling, build, cut, is_aligned
from worker.apollo.parameters import DTYPES, Options, Slot
from worker.apollo.state_layout import StateArea


class DeviceTables:
    """slots, area, options: as `parameters.Backend`'s; tiling: measured best by default."""

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
        self.sides = zeros(tables.sides)
        self.control = zeros(columns.CONTROLS.value, dtype=torch.int64)
        self.told = torch.zeros(columns.CONTROLS.value, dtype=torch.int64, pin_memory=self.pinned)

    def draw(self, draw: int) -> None:
        """Draw every P on the CPU, a stack's together, and send them up in one copy."""
        host = torch.zeros(self.projections.shape, pin_memory=self.pinned)
        places = zip(self.tables.slots, pairwise(self.tables.projections), strict=True)
        for _, group in groupby(places, key=lambda place: id(place[0].parameter)):
            slots, ranges = zip(*group, strict=True)
            start, end = ranges[0][0], ranges[-1][1]
            if end > start:
                p = self.options.draw_all(slots, draw)
                host[start:end].view(len(slots), -1)[:, : p.shape[1]] = p
        self.projections.copy_(host, non_blocking=True)
        self._drawn = draw

    def set_knobs(self, number: int, group: dict[str, Any], step_scale: float) -> None:
        """Changed values go up as arguments of a fill: no copy, no wait."""
        rate, (beta1, beta2) = formulas.learning_rate(group["lr"], step_scale), group["betas"]
        values = (rate, beta1, beta2, group["eps"], rate * group["weight_decay"], group["scale_front"], group["gamma"])
        known = self._knobs[number] or (None,) * len(values)
        for i, (value, old) in enumerate(zip(values, known, strict=True)):
            if value != old:
                self.knobs[number, i].fill_(float(value))
        self._knobs[number] = values

    def bind(self, pairs: Sequence[tuple[Slot, Tensor]]) -> list[Run]:
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
            first, last = min(changed), max(changed) + 1  # of a bucket of experts among tens of thousands
            rows = [entry or (0, 0, 0, 0) for entry in self._bound[first:last]]
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=self.pinned)
            self.bindings[first:last].copy_(host, non_blocking=True)
        else:
            for position in changed:
                for column, value in enumerate(entries[position]):
                    self.bindings[position, column].fill_(value)
        self._known = Known(() if self._copies else pairs)  # a copy has to be made again
        self._runs = cut({position: (self.tables.kinds[position], dtype) for position, dtype in dtypes.items()})
        return self._runs

    def _weight(self, position: int, slot: Slot) -> tuple[int, int]:
        """Address and row stride."""
        address = slot.parameter.data_ptr() + slot.offset(slot.parameter)
        if self._bound[position] and address == self._bound[position][0]:
            return address, self._bound[position][1]
        weight = slot.matrix(slot.parameter, "the weight")
        if self.tables.kinds[position].aligned and not is_aligned(weight):
            raise ApolloError(f"{slot.name} moved to an address that is not a multiple of 16 bytes")
        return address, weight.stride(0)

    def _gradient(self, position: int, slot: Slot, tensor: Tensor) -> tuple[int, int]:
        """Address and row stride. A gradient whose rows do not start at multiples of 16 bytes is copied if need be."""
        if tensor.is_contiguous() and tensor.dtype in DTYPES and tensor.shape == slot.parameter.shape:
            address, stride = tensor.data_ptr() + slot.offset(tensor), slot.cols
        else:
            gradient = slot.matrix(tensor, "the gradient")
            address, stride = gradient.data_ptr(), gradient.stride(0)
        if self.tables.kinds[position].aligned and (address % 16 or stride % UNIT):
            gradient = slot.matrix(tensor, "the gradient").clone(memory_format=torch.contiguous_format)
            address, stride = gradient.data_ptr(), slot.cols
            self._copies.append(gradient)  # alive until the step's launches are queued
        return address, stride


def _groups(slots: Sequence[Slot]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for slot in slots:
        if not any(slot.group is group for group in groups):
            groups.append(slot.group)
    return groups
