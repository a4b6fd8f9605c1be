"""Output head and cross entropy in one, without the logits ever standing in memory as a whole.

For 8,192 tokens and 248,320 words the logits are 4 GB in bf16 and 8 GB in fp32, and their gradient is as much again.
Here the vocabulary is gone through in blocks: once for every token's log-sum-exp, and once more in backward for the
gradients, which are therefore rounded to the weights' dtype once, however many blocks there are.

Must not know: examples, the optimizer.
Invariants: the loss of each token is that of `cross_entropy(head(hidden).float())` up to the order of sums; nothing of
size [N, V] outlives a block; no gradient is computed that nobody asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 27
"""Elements of one block of logits: 512 MiB in fp32, of which two stand at a time, and half of it in bf16."""


Keep = Callable[[Tensor, Tensor, int], None]
"""Takes the gradient of a block of logits [N, B], the hidden states [N, H], and the block's first row of the head."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, keep: Keep | None = None
) -> tuple[Tensor, Tensor]:
    """sum_i factors[i] * nll[i] (fp32 scalar, differentiable), and nll (fp32 [N], not).

    hidden: [N, H]; weight: the head's [V, H], of the same dtype; targets: int64 [N]; factors: fp32 [N].
    keep: in backward it gets, block by block, what the head's gradient is the product of; the head then gets none.
    """
    loss, nll = _LinearCrossEntropy.apply(hidden, weight, targets, factors, keep)
    return loss, nll


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, keep: Keep | None
    ) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(targets), device=hidden.device)  # [N]
        sums = torch.full((len(targets),), -torch.inf, device=hidden.device)  # log-sum-exp so far [N]
        own = torch.zeros_like(sums)  # the target's logit [N]
        for start, block in _blocks(weight, len(targets)):
            logits = (hidden @ block.T).float()  # [N, B]
            sums = torch.logaddexp(sums, logits.logsumexp(1))
            inside = (targets >= start) & (targets < start + len(block))  # [N]
            column = (targets - start).clamp(0, len(block) - 1)
            own = torch.where(inside, logits[rows, column], own)
        nll = sums - own
        ctx.save_for_backward(hidden, weight, targets, factors, sums)
        ctx.keep = keep
        ctx.mark_non_differentiable(nll)
        return (nll * factors).sum(), nll

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        hidden, weight, targets, factors, sums = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if to_hidden else None  # [N, H]
        d_weight = torch.empty_like(weight) if to_weight and ctx.keep is None else None  # [V, H]
        scale = (factors * outer)[:, None]  # [N, 1]
        rows = torch.arange(len(targets), device=hidden.device)
        for start, block in _blocks(weight, len(targets)):
            p = (hidden @ block.T).float().sub_(sums[:, None]).exp_()  # [N, B]
            inside = (targets >= start) & (targets < start + len(block))
            column = (targets - start).clamp(0, len(block) - 1)
            p[rows, column] -= inside.float()
            d_logits = p.mul_(scale).to(hidden.dtype)  # [N, B]
            if d_hidden is not None:
                d_hidden += d_logits @ block
            if d_weight is not None:
                torch.mm(d_logits.T, hidden, out=d_weight[start : start + len(block)])
            elif ctx.keep is not None:
                ctx.keep(d_logits, hidden, start)
        return (d_hidden.to(hidden.dtype) if d_hidden is not None else None), d_weight, None, None, None


def _blocks(weight: Tensor, tokens: int) -> list[tuple[int, Tensor]]:
    """(first row, rows) of the head, so that `tokens` logits for each row are no more than BLOCK elements."""
    height = max(1, min(len(weight), BLOCK // max(tokens, 1)))
    if 128 <= height < len(weight):
        height -= height % 128  # whole tiles
    return [(start, weight[start : start + height]) for start in range(0, len(weight), height)]
