"""Memory that is lent to the inputs of layers that are computed again in backward, by somebody who does not use it
meanwhile: the graphs of short rows hold as much as a long row needs, and never run beside one.

    lent = lend(model, region)      # region: uint8 [bytes]; once, for as long as the model lives
    lent.is_used                    # whether an input stands in it: its owner must not write there
    with lent.watched():            # forward and backward: raises if an input did not stay what it was
        ...

Must not know: the optimizer.
Invariants: what is computed has the bits that it has without; only where a layer's input stands is another. What does
not fit stands where it would have stood. Memory of an input that a backward pass may still read is never given to
another; factors outlive theirs, and while they are recorded nothing stands here.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from producer.errors import TandemError
from worker.model.gradient_factors import factors_of
from worker.model.layers import layers_of

ALIGNED = 512
"""Bytes: as torch's allocator aligns, so that kernels choose what they would have chosen."""


class LentMemoryError(TandemError):
    """What was kept in lent memory did not stay there."""


class LentMemory:
    """region: uint8 [bytes], contiguous."""

    def __init__(self, region: Tensor) -> None:
        self._region, self._taken = region, 0
        self._inputs: list[weakref.ref[Tensor]] = []
        self._marks: list[tuple[Tensor, Tensor]] | None = None
        """While it is watched: each input, and what it measured when it was put there."""

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self._region.nbytes

    @property
    def is_used(self) -> bool:
        """Whether a backward pass may still read anything that stands in it."""
        return any(ref() is not None for ref in self._inputs)

    def begin_pass(self) -> None:
        """A forward pass begins: what earlier ones left is given up, if nobody reads it any more."""
        if not self.is_used:
            self._inputs.clear()
            self._taken = 0

    def moved(self, x: Tensor) -> Tensor:
        """`x`, differentiable, in this memory; `x` itself where no room is left."""
        if self._taken + x.nbytes > self.nbytes or not x.is_contiguous():
            return x
        out: Tensor = _Moved.apply(x, self._place(x))
        self._inputs.append(weakref.ref(out))
        if self._marks is not None:
            self._marks.append((out.detach(), _mark(x)))
        return out

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around forward and backward passes, whose inputs stay: raises `LentMemoryError` where one was written over
        meanwhile."""
        marks: list[tuple[Tensor, Tensor]] = []
        self._marks = marks
        try:
            yield
        finally:
            self._marks = None
        if marks and not torch.stack([_mark(x) == mark for x, mark in marks]).all():
            raise LentMemoryError(
                "the memory that CUDA graphs lend to long rows did not keep what stood there: gradients would be wrong."
                " Start the worker with --graphs off, and report this"
            )

    def _place(self, x: Tensor) -> Tensor:
        """Not a view: autograd counts the writes to all views of one tensor together."""
        begin = (self._region.data_ptr() - self._region.untyped_storage().data_ptr() + self._taken) // x.element_size()
        self._taken += -(-x.nbytes // ALIGNED) * ALIGNED
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(
            self._region.untyped_storage(), begin, x.shape, x.stride()
        )


def _mark(x: Tensor) -> Tensor:
    """The sum of its bits, int64: any order of terms gives the same. Takes no memory where its bytes are whole
    words."""
    word = torch.int16 if x.nbytes % 8 else torch.int64
    return x.detach().reshape(-1).view(word).sum(dtype=torch.int64)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.mark_dirty(place)
        return place.copy_(x)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return outer, None


def lend(model: Any, region: Tensor) -> LentMemory:
    """Have the layers of `model` that are computed again (`layers.recompute`) keep their inputs in `region`."""
    lent, factors = LentMemory(region), factors_of(model)

    def is_wanted() -> bool:
        return torch.is_grad_enabled() and not factors.is_recording

    def begin(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if is_wanted():
            lent.begin_pass()

    model.base_model.register_forward_pre_hook(begin)
    layers: list[Any] = list(layers_of(model))
    for layer in layers:
        layer._gradient_checkpointing_func = _moving(layer._gradient_checkpointing_func, lent, is_wanted)
    return lent


def _moving(checkpoint: Callable[..., Any], lent: LentMemory, is_wanted: Callable[[], bool]) -> Callable[..., Any]:
    """checkpoint: as transformers calls it: with a layer and its arguments, hidden states [B, T, H] first."""

    def moving(layer: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
        return checkpoint(layer, lent.moved(hidden) if is_wanted() else hidden, *args)

    return moving
