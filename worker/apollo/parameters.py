"""What the optimizer knows of one parameter, and the small interface that a device's implementation fills.

A slot is a *logical* matrix: a row slice of a merged weight is one slot, with its own s and limiter, and so is each
expert of a stack [E, rows, cols]. Anything else that is not 2-D is seen as [first dimension, the rest], a vector as one
row, so that element numbers are those of the flat tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.apollo import philox
from worker.apollo.errors import ApolloError
from worker.apollo.formulas import is_tall, root_scale
from worker.apollo.products import FromProducts
from worker.apollo.state_layout import ADAMW, FACTORED, MATRIX_ALGORITHMS, algorithm_for, stacked
from worker.utils.shard import Shard
from worker.utils.stacks import is_stack

Projection = Callable[[int, tuple[int, int], int], Tensor]
"""(index of the parameter, shape of P, number of the draw) -> fp32 tensor of that shape."""

DTYPES = (torch.bfloat16, torch.float32)

SumOverShards = Callable[[list[Tensor]], None]
"""Adds each tensor up, in place, over the processes that hold the shards. All call it alike, with tensors of the same
shapes and dtypes in the same order; the sum is the same, bit for bit, on each."""

_PER_PARAMETER = ("ids", "places", "shards")
"""Group keys that hold one entry a parameter."""

EXPERTS_FROM = 1 << 16
"""The id of expert e of parameter p is p + e times this: ids of parameters are smaller where there is a stack."""


@dataclass(frozen=True)
class Place:
    """Where a shard's first element lies in the unsharded matrix, whose rows are `full_cols` long."""

    row: int
    col: int
    full_cols: int


@dataclass
class Slot:
    """One parameter, or the matrix number `part` of a stack."""

    index: int
    name: str
    parameter: Tensor
    group: dict[str, Any]
    id: int
    algorithm: str
    rows: int
    cols: int
    place: Place
    part: int | None = None
    shard: Shard | None = None
    """Which part of a whole matrix this process holds: `rows` and `cols` are the part's; None: all of it."""

    @property
    def whole(self) -> tuple[int, int]:
        """[rows, cols] of the whole matrix, which decides everything about it."""
        return (self.rows, self.cols) if self.shard is None else matrix_shape(self.shard.shape)

    @property
    def tall(self) -> bool:
        return is_tall(*self.whole)

    @property
    def root(self) -> float:
        return root_scale(self.group["scale"], *self.whole)

    @property
    def kept(self) -> int:
        """Elements of R, m and v here."""
        return self.rows if self.tall else self.cols

    @property
    def projected(self) -> int:
        """Elements of P here."""
        return self.cols if self.tall else self.rows

    @property
    def sums_r(self) -> bool:
        """Whether R is a sum over the shards: the side that is projected away is divided."""
        return self.shard is not None and (self.shard.dim == 1) == self.tall

    @property
    def sums_norms(self) -> bool:
        """Whether R and N are parts: the side that is kept is divided."""
        return self.shard is not None and not self.sums_r

    @property
    def runs(self) -> list[tuple[range, int]]:
        """(rows, number of the first in the whole matrix) of each run of consecutive rows."""
        if self.shard is None or self.shard.dim == 1 or len(self.shard.shape) < 2:
            return [(range(self.rows), self.place.row)]
        runs, start = [], 0
        for first, count in self.shard.pieces:
            runs.append((range(start, start + count), first))
            start += count
        return runs

    def offset(self, tensor: Tensor) -> int:
        """Bytes from the beginning of `tensor`, of the whole parameter's shape, to this slot's part of it."""
        return 0 if self.part is None else self.part * tensor.stride(0) * tensor.element_size()

    def matrix(self, tensor: Tensor, what: str) -> Tensor:
        """Of `tensor`, a weight or a gradient of the whole parameter, this slot's [rows, cols], a view with unit column
        stride."""
        if tensor.dtype not in DTYPES:
            raise ApolloError(f"{what} of {self.name} is {tensor.dtype}: only bfloat16 and float32 are supported")
        if tensor.layout != torch.strided or tensor.shape != self.parameter.shape:
            raise ApolloError(f"{what} of {self.name} must be dense and of shape {list(self.parameter.shape)}")
        whole = tensor.detach()
        view: Tensor | None
        try:
            view = whole.view(self.rows, self.cols) if self.part is None else whole[self.part]
        except RuntimeError:
            view = None
        if view is None or (self.cols > 1 and view.stride(1) != 1):
            raise ApolloError(f"{what} of {self.name} has strides {tensor.stride()}: its rows must be contiguous")
        return view


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[rows, cols] under which a parameter of any dimension is handled."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class Options:
    """What is the same for all parameters."""

    seed: int
    stochastic: bool
    projection: Projection | None
    sum_over_shards: SumOverShards | None = None

    def draw(self, slot: Slot, draw: int) -> Tensor:
        """P of `slot` for the `draw`-th redraw: fp32 [min(rows, cols)], on the CPU. Never stored with the state. Of a
        shard whose projected side is divided, its part of the whole matrix's P."""
        whole = self._draw_whole(slot, draw)
        if slot.shard is None or not slot.sums_r:
            return whole
        return torch.cat([whole[first : first + count] for first, count in slot.shard.pieces])

    def _draw_whole(self, slot: Slot, draw: int) -> Tensor:
        length = min(slot.whole)
        if self.projection is None:
            return philox.projection(self.seed, slot.id, draw, length)
        shape = (1, length) if slot.tall else (length, 1)
        given = self.projection(slot.index, shape, draw)
        if given.dtype != torch.float32 or given.shape != shape:
            raise ApolloError(f"projection() must return float32 of shape {list(shape)} for {slot.name}")
        return given.detach().cpu().flatten()

    def draw_all(self, slots: Sequence[Slot], draw: int) -> Tensor:
        """`draw` of several matrices of one shape, together where they are whole: fp32 [slots, length of one]."""
        if self.projection is not None or any(slot.shard is not None for slot in slots):
            return torch.stack([self.draw(slot, draw) for slot in slots])
        return philox.projections(self.seed, [slot.id for slot in slots], draw, min(slots[0].whole))


@dataclass(frozen=True)
class Totals:
    """Sums over the elements that one step updated."""

    update_squares: float
    weight_squares: float
    elements: int


class LastUpdate:
    """How large the last step was. Nothing is computed, and no device waited for, until it is read."""

    def __init__(self, read: Callable[[], Totals]) -> None:
        self._read = read
        self._totals: Totals | None = None

    def _value(self) -> Totals:
        if self._totals is None:
            self._totals = self._read()
        return self._totals

    @property
    def update_rms(self) -> float:
        """RMS of the step's change over all elements that had a gradient, before rounding and decay."""
        totals = self._value()
        return math.sqrt(totals.update_squares / max(totals.elements, 1))

    @property
    def weight_rms(self) -> float:
        """RMS of the same elements' weights before the step."""
        totals = self._value()
        return math.sqrt(totals.weight_squares / max(totals.elements, 1))


class Backend(FromProducts, Protocol):
    """One device's implementation of a step. `begin`, any number of `update`s of different slots, `finish`."""

    def begin(self, draw: int, step_scale: float) -> None:
        """Start step t = step count + 1 with projections of redraw `draw`; its update and decay are multiplied with
        `step_scale`."""

    def prepare(self, draw: int, step_scale: float = 1.0) -> None:
        """The host's part of `begin`; harmless if done twice."""

    def capture(self, pairs: Sequence[tuple[Slot, Tensor]]) -> Callable[[], None]:
        """A step over these gradients as something that can be replayed."""

    def order(self) -> Sequence[Slot]:
        """All slots, those that can share a launch side by side."""

    def update(self, pairs: Sequence[tuple[Slot, Tensor]]) -> None:
        """Apply these gradients, or, if one is not finite, report it and change nothing."""

    def finish(self) -> None:
        """End the step: the step count goes up by one."""

    def check(self) -> None:
        """Raise `NonFiniteGradientError` if a step was refused and nobody was told yet. Waits for the device."""

    def totals(self) -> Totals:
        """Of the last finished step. Waits for the device."""


def make_slots(groups: Sequence[dict[str, Any]], matrices: str) -> list[Slot]:
    """One slot a parameter, or a matrix of a stack, in the order given; `matrices`: what matrices take. Raises
    `ApolloError` naming what does not fit."""
    names = [name for group in groups for name in group.get("param_names", ())]
    rank = {name: i for i, name in enumerate(sorted(names))}
    slots: list[Slot] = []
    number = 0
    for group in groups:
        for key in _PER_PARAMETER:
            if group.get(key) is not None and len(group[key]) != len(group["params"]):
                raise ApolloError(f'a parameter group\'s "{key}" must have one entry for each of its parameters')
        for i, parameter in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else f"parameter {number}"
            algorithm = group.get("algorithm") or algorithm_for(parameter.shape, matrices)
            slots += _slots_of(len(slots), name, i, parameter, group, rank.get(name, number), algorithm)
            number += 1
    return slots


def _slots_of(
    index: int, name: str, i: int, parameter: Tensor, group: dict[str, Any], rank: int, algorithm: str
) -> list[Slot]:
    if algorithm not in (*MATRIX_ALGORITHMS, ADAMW):
        raise ApolloError(f'a parameter group\'s "algorithm" is "apollo", "factored" or "adamw", not {algorithm!r}')
    if algorithm in MATRIX_ALGORITHMS and parameter.dim() != 2 and not is_stack(parameter.shape):
        raise ApolloError(f'{name} has {parameter.dim()} dimensions: "{algorithm}" is for matrices')
    if parameter.dtype not in DTYPES or parameter.numel() == 0:
        raise ApolloError(
            f"{name} is {parameter.dtype} of shape {list(parameter.shape)}: only bfloat16 and float32, not empty"
        )
    count = stacked(parameter.shape, algorithm)
    rows, cols = matrix_shape(parameter.shape[1:] if count else parameter.shape)
    id = group["ids"][i] if group.get("ids") is not None else rank
    shard = group["shards"][i] if group.get("shards") is not None else None
    if shard is not None:
        place = _place_of(name, shard, parameter, algorithm, stack=bool(count))
    else:
        place = Place(*group["places"][i]) if group.get("places") is not None else Place(0, 0, cols)
    if count and not (0 <= id < EXPERTS_FROM and count <= EXPERTS_FROM):
        raise ApolloError(f"{name} is a stack of {count} matrices with the id {id}: both are below {EXPERTS_FROM}")
    whole = Slot(index, name, parameter, group, id, algorithm, rows, cols, place, shard=shard)
    slots = [whole] if not count else [
        replace(whole, index=index + e, name=f"{name}[{e}]", id=id + e * EXPERTS_FROM, part=e) for e in range(count)
    ]  # fmt: skip
    slots[0].matrix(parameter, "the weight")  # refuses strides it cannot follow
    return slots


def _place_of(name: str, shard: Shard, parameter: Tensor, algorithm: str, *, stack: bool) -> Place:
    """Where the part's first element lies in the whole. Raises `ApolloError` for what is no part, or is not known."""
    if shard.local != tuple(parameter.shape):
        raise ApolloError(f"{name} has shape {list(parameter.shape)}, and its shard {list(shard.local)}")
    if algorithm == FACTORED:
        raise ApolloError(
            f'{name} is divided over processes, which "factored" does not know: serve with --optimizer apollo-mini'
        )
    if stack:
        raise ApolloError(f"{name} is a stack of matrices that is divided over processes, which is not known")
    in_rows = shard.dim == 0 and len(shard.shape) > 1
    if not in_rows and (len(shard.pieces) > 1 or len(shard.shape) > 2):
        raise ApolloError(f"{name} is divided into pieces of its columns: only one piece of a matrix's is known")
    full_cols = matrix_shape(shard.shape)[1]
    return Place(shard.pieces[0][0], 0, full_cols) if in_rows else Place(0, shard.pieces[0][0], full_cols)
