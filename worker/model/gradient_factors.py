"""Keeps a matrix's gradient as its factors: dW = dY^T X is not formed in backward, its X and dY are remembered instead.

    factors = GradientFactors(model)
    with factors.recording():          # forward and backward; one `begin_pass` before each backward
        factors.begin_pass()
        loss.backward()
    factors.of(weight).write(out)      # the very bits that backward would have put into `weight.grad`

Linear layers, the embeddings and the output head are kept in this way; every other parameter has its gradient as ever.
What is kept of one matrix, and what can be made of it: `factors`.

Must not know: the optimizer.
Invariants: outside `recording` the model computes what it computed before. Of a layer that is computed again in
backward, the inputs kept are those of the second time: the first ones were dropped.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.model.factors import Factors, Product, Rows

Keep = Callable[[Tensor, Tensor], None]
"""Takes dY [T, rows] and X [T, cols]."""


def factors_of(model: Any) -> "GradientFactors":
    """The one of `model`: its layers are wrapped once, however many trainers it has."""
    if not isinstance(known := getattr(model, "_gradient_factors", None), GradientFactors):
        known = model._gradient_factors = GradientFactors(model)
    return known


class GradientFactors:
    """The factors of `model`, a transformers causal language model, whose linear layers it wraps.

    A matrix that several linear layers share, or of a dtype that is not the activations', is left to autograd.
    """

    def __init__(self, model: Any) -> None:
        self._kept: dict[int, Factors] = {}
        self.known: tuple[list[Tensor], Tensor] | None = None
        """Parameters whose gradients' squared norms came with the factors, fp64 [n]."""
        self._recording = False
        self._passes = 0
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        modules = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        users: dict[int, int] = {}
        for module in modules:
            users[id(module.weight)] = users.get(id(module.weight), 0) + 1
        apart = {id(head.weight), id(table.weight)}
        for module in modules:
            if users[id(module.weight)] == 1 and id(module.weight) not in apart:
                module.forward = MethodType(self._linear(module.forward), module)  # type: ignore[method-assign]
                apart.add(id(module.weight))
        table.forward = MethodType(self._embedding(table.forward), table)
        self._taken = apart

    def takes(self, weight: Tensor) -> bool:
        """Whether the gradient of `weight` is kept as factors while recording."""
        return id(weight) in self._taken and weight.requires_grad

    @property
    def is_recording(self) -> bool:
        """Whether forward and backward keep factors now."""
        return self._recording

    def products(self) -> Iterator[tuple[Tensor, Product]]:
        """(weight, product) of all that is kept, those of embeddings aside."""
        for entry in self._kept.values():
            for products, _ in entry.passes:
                yield from ((entry.weight, product) for product in products)

    def keep(self, weight: Tensor, product: Product) -> None:
        """What backward would have kept of it, computed elsewhere."""
        self._keep(weight, product)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, forward and backward keep factors; those of earlier blocks stay until `forget`."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def begin_pass(self) -> None:
        """A backward pass begins: gradients of different passes are rounded before they are added up."""
        self._passes += 1

    def of(self, weight: Tensor) -> Factors | None:
        """What was kept of it; None if nothing was."""
        return self._kept.get(id(weight))

    def settle(self) -> None:
        """Everything kept is contiguous afterwards: the layout that it has where it was sent to, and a product's bits
        may follow the layout. Norms that came with the factors are of one part of them: they are let go."""
        same: dict[int, Tensor] = {}

        def contiguous(tensor: Tensor) -> Tensor:
            return same.setdefault(id(tensor), tensor.contiguous())

        for entry in self._kept.values():
            entry.passes = [
                (
                    [Product(contiguous(p.left), contiguous(p.right), p.first) for p in products],
                    [Rows(contiguous(r.rows), contiguous(r.values)) for r in rows],
                )
                for products, rows in entry.passes
            ]
        self.known = None

    def replace(self, every: Iterable[Factors]) -> None:
        """Keep these, and nothing else."""
        self._kept = {id(entry.weight): entry for entry in every}

    def forget(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._passes, self.known = 0, None

    def head_keeper(self, weight: Tensor) -> Callable[[Tensor, Tensor, int], None] | None:
        """For the loss: takes (gradient of a block of logits [N, B], hidden [N, H], the block's first row); None while
        the head's gradient is wanted as ever."""
        if not self._recording or not self.takes(weight):
            return None
        return lambda left, right, first: self._keep(weight, Product(left, right, first))

    def _keep(self, weight: Tensor, part: Product | Rows) -> None:
        entry = self._kept.setdefault(id(weight), Factors(weight))
        if len(entry.passes) < self._passes:
            entry.passes.append(([], []))
        products, rows = entry.passes[-1]
        if isinstance(part, Product):
            products.append(part)
        else:
            rows.append(part)

    def _linear(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        def forward(module: Any, x: Tensor) -> Tensor:
            weight = module.weight
            if not (self._recording and torch.is_grad_enabled() and weight.requires_grad):
                return plain(x)
            return _Linear.apply(x, weight, module.bias, lambda dy, x: self._keep(weight, Product(dy, x)))  # type: ignore[no-any-return]

        return forward

    def _embedding(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        def forward(module: Any, ids: Tensor) -> Tensor:
            weight = module.weight
            if not (self._recording and torch.is_grad_enabled() and weight.requires_grad):
                return plain(ids)

            def keep(gradient: Tensor, ids: Tensor) -> None:
                self._keep(weight, Rows.of(ids, gradient, module.padding_idx))

            return _Embedding.apply(weight, ids, keep)  # type: ignore[no-any-return]

        return forward


class _Linear(torch.autograd.Function):
    """functional.linear whose weight gets no gradient: what it would be made of goes to `keep`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.keep = keep
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dy = outer.reshape(-1, weight.shape[0])  # [T, rows]
        ctx.keep(dy, x.reshape(-1, weight.shape[1]))
        dx = (dy @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, None


class _Embedding(torch.autograd.Function):
    """functional.embedding in the same way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, keep: Keep) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.keep = keep
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ctx.keep(outer.reshape(-1, outer.shape[-1]), ids.reshape(-1))
        return None, None, None
