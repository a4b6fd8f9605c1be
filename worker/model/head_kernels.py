"""The cross entropy over a block of logits in two passes of a GPU: one reads them, one makes their gradient in place.

What torch's own operations do in a dozen passes over fp32 copies of the logits is done on the logits as they come, in
the weights' dtype. Triton's; a CPU never imports it.

Must not know: examples, the optimizer.
Invariants: sums are in fp32, in an order that does not change; each row is its own, so that one with NaN or infinite
logits leaves the others alone; the numbers of tokens and words are not compiled in, so that no batch compiles anew.
"""

# mypy: disable-error-code=no-untyped-def
import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Words that a program has at a time."""
WARPS = 8
UNIT = 8
"""Elements of a 16-byte access to bf16: rows that start at multiples of it are read so."""
LEAST = tl.constexpr(-3.4028234663852886e38)
"""fp32's own: finite, since the difference of two infinite ones is not a number."""


def sums_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits: [N, B], rows one after the other; targets: int64 [N], the column of each, or outside of 0 to B - 1. Every
    row's log-sum-exp, and its target's logit, 0 where that is outside: fp32 [N] both."""
    tokens, words = logits.shape
    sums = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    own = torch.empty_like(sums)
    _sum_row[(tokens,)](
        logits, logits.stride(0), targets, sums, own, words,
        ALIGNED=_aligned(logits), WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return sums, own


def to_gradient_(logits: Tensor, targets: Tensor, sums: Tensor, scale: Tensor) -> Tensor:
    """In place: (exp(logit - sums) - [it is the target's]) * scale, rounded once. sums, scale: fp32 [N]."""
    tokens, words = logits.shape
    _gradient[(tokens, triton.cdiv(words, WIDTH))](
        logits, logits.stride(0), targets, sums, scale, words,
        ALIGNED=_aligned(logits), WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    return logits


def _aligned(logits: Tensor) -> bool:
    assert logits.stride(1) == 1, "a row's logits are side by side"
    return logits.stride(0) % UNIT == 0


@triton.jit(do_not_specialize=["stride", "words"])
def _sum_row(logits, stride, targets, sums, own, words, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    most = tl.full([WIDTH], LEAST, tl.float32)  # so far, of each column's words
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, words, WIDTH):
        column = first + tl.arange(0, WIDTH)
        z = tl.load(start + column, column < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, z)
        total = total * tl.exp(most - higher) + tl.exp(z - higher)
        most = higher
    highest = tl.max(most, 0)
    tl.store(sums + row, highest + tl.log(tl.sum(total * tl.exp(most - highest), 0)))
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < words)
    tl.store(own + row, tl.load(start + target, inside, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["stride", "words"])
def _gradient(logits, stride, targets, sums, scale, words, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = column < words
    p = tl.exp(tl.load(start + column, there, other=0.0).to(tl.float32) - tl.load(sums + row))
    p -= (column == tl.load(targets + row)).to(tl.float32)
    tl.store(start + column, (p * tl.load(scale + row)).to(logits.dtype.element_ty), there)
