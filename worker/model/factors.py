"""The factors of one matrix's gradient: dW = dY^T X, formed when it is wanted, and its norm without forming it.

    factors.write(out)      # the very bits that backward would have put into `weight.grad`
    factors.squares()       # the squared norm, where that is less work than the gradient

For T tokens the factors of a matrix take T (rows + cols) numbers in place of rows * cols. Who keeps them while a
backward pass runs: `gradient_factors`. Must not know: the optimizer.
Invariant: a product is the call of torch.mm that autograd would have made, on the same operands in the same layout.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """left^T right, rows `first` and following of a gradient. left: dY [T, rows]; right: X [T, cols]."""

    left: Tensor
    right: Tensor
    first: int = 0

    def write(self, out: Tensor) -> None:
        """Into its rows of `out` [rows of the whole matrix, cols], of the factors' dtype."""
        torch.mm(self.left.t(), self.right, out=out[self.first : self.first + self.left.shape[1]])


@dataclass(frozen=True)
class Rows:
    """An embedding's gradient: zero but for `rows`, int64 [U] and all different, which are `values` [U, cols]."""

    rows: Tensor
    values: Tensor

    @staticmethod
    def of(ids: Tensor, gradient: Tensor, padding: int | None) -> "Rows":
        """ids: the tokens looked up, int64 [T]; gradient: that of the rows found, [T, cols]; padding: an id that gets
        none. Sums in the order in which torch's embedding does."""
        rows, places = torch.unique(ids, return_inverse=True)
        skipped = -1
        if padding is not None:  # -1 means none to torch; any other number chooses another kernel
            known = (rows == padding).nonzero()
            skipped = int(known[0]) if len(known) else len(rows)
        values = torch.ops.aten.embedding_dense_backward(gradient, places, len(rows), skipped, False)
        return Rows(rows, values)

    def write(self, out: Tensor) -> None:
        """Fill `out` [rows of the whole matrix, cols]."""
        out.zero_().index_copy_(0, self.rows, self.values)

    def add(self, out: Tensor) -> None:
        """Add to `out` as autograd adds a second gradient: rounded once, to its dtype."""
        out.index_add_(0, self.rows, self.values)


@dataclass
class Factors:
    """Of one matrix: for each backward pass, what it left. A tied table has the head's products and the lookup."""

    weight: Tensor
    passes: list[tuple[list[Product], list[Rows]]] = field(default_factory=list)

    def write(self, out: Tensor) -> None:
        """The gradient, into `out` of the weight's shape and dtype. More than one pass takes memory for one more."""
        first, *others = self.passes
        self._write_pass(first, out)
        for products in others:
            more = torch.empty_like(out)
            self._write_pass(products, more)
            out += more

    @property
    def nbytes(self) -> int:
        """Of the factors; an input that several matrices share is counted for each."""
        return sum(
            sum(p.left.nbytes + p.right.nbytes for p in products) + sum(r.values.nbytes for r in rows)
            for products, rows in self.passes
        )

    @property
    def inputs(self) -> int:
        """Address of its first product's X, which several matrices may share; 0 where there is none."""
        return next((p.right.data_ptr() for products, _ in self.passes for p in products), 0)

    def squares(self, inputs: dict[int, Tensor] | None = None) -> Tensor | None:
        """The gradient's squared norm (fp64 scalar on its device) from T x T products, where that is less work than the
        gradient itself and there was one pass; else None.

        inputs: X X^T by the address of X, for matrices that share their input; it is added to.
        """
        if len(self.passes) != 1:
            return None
        products, rows = self.passes[0]
        tokens = max((len(p.left) for p in products), default=0)
        height, width = self.weight.shape
        if tokens * (height + width) > height * width:
            return None
        total: Any = 0.0
        if products:
            outputs = sum((_gram(p.left) for p in products[1:]), _gram(products[0].left))
            known, x = inputs if inputs is not None else {}, products[0].right
            if x.data_ptr() not in known:
                known[x.data_ptr()] = _gram(x)
            total = total + (outputs * known[x.data_ptr()]).sum(dtype=torch.float64)
        for some in rows:
            values = some.values.float()
            total = total + values.square().sum(dtype=torch.float64)
            for product in products:  # twice the inner product, of which only the looked-up rows are not zero
                total = total + 2 * (_rows_of(product, some.rows) * values).sum(dtype=torch.float64)
        return total

    @staticmethod
    def _write_pass(parts: tuple[list[Product], list[Rows]], out: Tensor) -> None:
        products, rows = parts
        for product in products:
            product.write(out)
        for i, some in enumerate(rows):
            if i or products:
                some.add(out)
            else:
                some.write(out)


def _gram(x: Tensor) -> Tensor:
    """x x^T [T, T] in fp32, summed in fp32: rounded to bf16 the terms of a norm would no longer cancel."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, x.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), x.float().t())


def _rows_of(product: Product, rows: Tensor) -> Tensor:
    """These rows, int64 [U], of the whole matrix's product: fp32 [U, cols], zero where it has none of them."""
    inside = (rows >= product.first) & (rows < product.first + product.left.shape[1])
    place = (rows - product.first).clamp(0, product.left.shape[1] - 1)
    left = product.left[:, place].float() * inside
    return left.t() @ product.right.float()
