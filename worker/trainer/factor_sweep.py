"""A step from factors: products are formed into one buffer and applied, bucket by bucket, until all matrices are done.

    sweep = FactorSweep(factors, optimizer)
    sweep.reserve()                    # before the forward pass: all the memory that `apply` will take
    ...                                # forward and backward, recorded by `factors`
    norm = sweep.norm()                # refuses what is not finite while nothing has been written
    sweep.apply()                      # one step of the optimizer; the time in which a server stands still
    sweep.forget()

Must not know: the server, versions.
On CUDA the optimizer decides from the factors what a matrix is moved by, and then reads the gradient once, not twice.
Invariants: gradients have the very bits that autograd makes. On a CPU so has the step that the optimizer makes of them;
on CUDA its moments are nearer to the exact ones. `apply` takes no memory for the first time (with one backward pass; a
second one needs a matrix more).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from worker.apollo import ApolloMini, GradientProduct, NonFiniteGradientError
from worker.model.factors import Factors
from worker.model.gradient_factors import GradientFactors
from worker.trainer.side_by_side import SideBySide

ALIGNMENT = 512
"""Of a product in the buffer, in bytes: what torch's own allocations have, so that the same kernels are chosen."""
LARGEST_SQUARES = 1e38
"""A squared norm that the optimizer's sums in fp32 still hold, with room for another order of them."""


class FactorSweep:
    """bucket_bytes: of gradients that are formed before they are applied together; at least the largest matrix."""

    def __init__(self, factors: GradientFactors, optimizer: ApolloMini, bucket_bytes: int = 1 << 30) -> None:
        self.factors, self.optimizer, self.bucket_bytes = factors, optimizer, bucket_bytes
        self._buffer: Tensor | None = None
        self._buckets: list[list[tuple[Factors, Tensor]]] | None = None
        self._norms: dict[int, Tensor] = {}
        """Squared norms that are known, by the parameter's id."""
        self._prepared: Any = None
        """Products from which the optimizer decides."""
        self._decided: set[int] = set()
        """Ids of their weights."""

    def buffer_bytes(self) -> int:
        """What `reserve` takes."""
        sizes = [_aligned(p.nbytes) for p in self.optimizer.sweep_order() if self.factors.takes(p)]
        return min(max([self.bucket_bytes, *sizes]), sum(sizes))

    def reserve(self) -> None:
        """Take the buffer."""
        if self._buffer is None:
            device = self.optimizer.sweep_order()[0].device
            self._buffer = torch.empty(self.buffer_bytes(), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def norm(self) -> float:
        """The L2 norm of all gradients together; waits for the device once.

        Raises `NonFiniteGradientError` naming the first parameter whose gradient is not finite, or too large to be
        measured in fp32.
        """
        known = self.factors.known or ([], None)
        done = {id(parameter) for parameter in known[0]}
        others, squares = self.squares(
            parameter for parameter in self.optimizer.sweep_order() if id(parameter) not in done
        )
        parts = [part for part in (known[1], squares) if part is not None]
        if not parts:
            return 0.0
        together = torch.cat(parts)
        self._norms = {id(parameter): one for parameter, one in zip([*known[0], *others], together, strict=True)}
        all = together.cpu()
        bad = ~(all < LARGEST_SQUARES)  # true for NaN as well
        if bad.any():
            raise NonFiniteGradientError(self.optimizer.name_of([*known[0], *others][int(bad.nonzero()[0])]))
        return math.sqrt(max(0.0, float(all.sum())))

    @torch.no_grad()
    def squares(
        self, parameters: Iterable[Tensor], streams: Sequence[torch.cuda.Stream] = ()
    ) -> tuple[list[Tensor], Tensor | None]:
        """Those of `parameters` that have a gradient, and their squared norms, fp64 [n], or None. Does not wait.
        streams: where they are computed, some at a time; there must be no buffer (`reserve`) then."""
        assert not streams or self._buffer is None
        found: list[tuple[Tensor, Tensor]] = []
        grams: dict[int, Tensor] = {}
        with SideBySide(streams) as beside:
            for parameter in parameters:
                if (kept := self.factors.of(parameter)) is not None:
                    with beside.on(kept.inputs, kept.nbytes):
                        found.append((parameter, self._squares(kept, grams)))
                elif parameter.grad is not None:
                    norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
                    found.append((parameter, norm.double().square()))
        return [one for one, _ in found], torch.stack([value for _, value in found]) if found else None

    @torch.no_grad()
    def prepare(self) -> None:
        """Decide which products are formed where, and ready those from which the optimizer decides; `apply` does it
        otherwise."""
        if self._buckets is None:
            given = [one for kept in self._kept() if (one := self._product(kept)) is not None]
            self._prepared = self.optimizer.prepare_products(given) if given else None
            self._decided = {id(one.weight) for one in given}
            self._buckets = self._fill()

    @torch.no_grad()
    def apply(self, step_scale: float = 1.0) -> None:
        """One step, multiplied with `step_scale`, over all that was kept, and the gradients beside it. What goes wrong
        in it leaves weights half-written."""
        self.prepare()
        self.optimizer.begin(step_scale)
        try:
            if self._prepared is not None:
                self.optimizer.decide_products(self._prepared)
            for bucket in self.products():
                if decided := [pair for pair in bucket if id(pair[0]) in self._decided]:
                    self.optimizer.write(decided)
                if others := [pair for pair in bucket if id(pair[0]) not in self._decided]:
                    self.optimizer.update_many(others)
            small = [(p, p.grad) for p in self.optimizer.sweep_order() if self._is_plain(p) and p.grad is not None]
            self.optimizer.update_many(small)
        except BaseException:
            self.optimizer.abandon()
            raise
        self.optimizer.finish()

    @torch.no_grad()
    def rehearse(self) -> None:
        """`norm` and every product, whatever they are, and nothing applied: what they need of libraries is loaded
        afterwards."""
        with suppress(NonFiniteGradientError):
            self.norm()
        for _ in self.products():
            pass

    @torch.no_grad()
    def products(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """(weight, gradient) of every matrix, a bucket at a time; the next bucket takes the place of the last."""
        self.prepare()
        assert self._buckets is not None
        for bucket in self._buckets:
            for kept, out in bucket:
                kept.write(out)
            yield [(kept.weight, out) for kept, out in bucket]

    def forget(self) -> None:
        """Let go of factors and buffer."""
        self.factors.forget()
        self._buffer = self._buckets = self._prepared = None
        self._norms, self._decided = {}, set()

    def _is_plain(self, parameter: Tensor) -> bool:
        return self.factors.of(parameter) is None

    def _squares(self, kept: Factors, grams: dict[int, Tensor]) -> Tensor:
        if (squares := kept.squares(grams)) is not None:
            return squares
        out = torch.empty_like(kept.weight) if self._buffer is None else self._place(kept.weight, 0)
        kept.write(out)
        return torch.linalg.vector_norm(out, dtype=torch.float32).double().square()

    def _kept(self) -> Iterator[Factors]:
        """In the optimizer's order, in which neighbours share launches."""
        for parameter in self.optimizer.sweep_order():
            if (kept := self.factors.of(parameter)) is not None:
                yield kept

    def _product(self, kept: Factors) -> GradientProduct | None:
        """Of one backward pass, and nothing looked up beside it, if the optimizer can decide from it."""
        if len(kept.passes) != 1 or kept.passes[0][1]:
            return None
        parts = [(product.left, product.right, product.first) for product in kept.passes[0][0]]
        if not self.optimizer.takes_product(kept.weight, parts):
            return None
        squares = self._norms.get(id(kept.weight))
        return GradientProduct(kept.weight, parts, self._squares(kept, {}) if squares is None else squares)

    def _fill(self) -> list[list[tuple[Factors, Tensor]]]:
        """Factors, and where in the buffer their product goes."""
        every = list(self._kept())
        if not every:  # all of a micro-batch was refused
            return []
        assert self._buffer is not None, "apply() without reserve()"
        buckets: list[list[tuple[Factors, Tensor]]] = []
        end = len(self._buffer)
        for kept in every:
            parameter = kept.weight
            if end + parameter.nbytes > len(self._buffer):
                buckets.append([])
                end = 0
            buckets[-1].append((kept, self._place(parameter, end)))
            end += _aligned(parameter.nbytes)
        return buckets

    def _place(self, parameter: Tensor, start: int) -> Tensor:
        assert self._buffer is not None
        return self._buffer[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
