"""The cross entropy on a GPU where no token has a teacher and nothing follows the product with the head's matrix.

`worker.model.loss` takes it where `takes` says so. Two kernels (`head_kernels`) do what follows the product, on the
logits as it leaves them. Where all logits are one block, 256 MB at most, they are kept for backward, which makes their
gradient in their place; else they are computed again there.

Must not know: examples, the optimizer.
Invariants: loss and gradients are those of `worker.model.loss` up to the order of sums; no gradient is computed that
nobody asked for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.model.head_blocks import After, blocks_of
from worker.model.head_gradients import HeadGradients, Keep
from worker.model.vocabulary_shard import VocabularyShard

TOKENS = 8
"""N is made a multiple of it: where it is odd, cuBLAS forms the tokens' products with each other, of which the norm of
a gradient is made, several times slower. The last token stands there again, and weighs nothing."""


def takes(hidden: Tensor, after: After) -> bool:
    """hidden: [N, H]."""
    return hidden.is_cuda and len(hidden) > 0 and after.is_nothing


def plain_head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor,
    keep: Keep | None,
    vocabulary: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """The loss and the nll, fp32 [N], of arguments as `head_loss` has them."""
    tokens = len(targets)
    if more := -tokens % TOKENS:
        hidden, targets = _repeated(hidden, more), _repeated(targets, more)
        factors = functional.pad(factors, (0, more))
    loss, nll = _PlainHeadLoss.apply(hidden, weight, targets, factors, keep, vocabulary)
    return loss, nll[:tokens]


def _repeated(x: Tensor, more: int) -> Tensor:
    """`x` [N, ...] and its last row `more` times: no other row is added, whose loss might not be finite."""
    return torch.cat([x, x[-1:].expand(more, *x.shape[1:])])


class _PlainHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, keep: Any, vocabulary: Any
    ) -> tuple[Tensor, Tensor]:
        from worker.model import head_kernels

        sums = torch.full((len(targets),), -torch.inf, device=hidden.device)  # log-sum-exp so far [N]
        own = torch.zeros_like(sums)  # the target's logit [N]
        for start, block in blocks_of(weight, len(targets)):
            logits = hidden @ block.T  # [N, B]
            some, one = head_kernels.sums_of(logits, targets - start)
            sums, own = torch.logaddexp(sums, some), own + one
        if vocabulary is not None:
            sums, own = vocabulary.log_sum_exp(sums), vocabulary.total(own)
        nll = sums - own
        ctx.keep, ctx.vocabulary = keep, vocabulary
        ctx.logits = logits if len(block) == len(weight) else None
        ctx.save_for_backward(hidden, weight, targets, factors, sums)
        ctx.mark_non_differentiable(nll)
        return (nll * factors).sum(), nll

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from worker.model import head_kernels

        hidden, weight, targets, factors, sums = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None
        found, scale = HeadGradients(hidden, weight, ctx.needs_input_grad, ctx.keep, ctx.vocabulary), factors * outer
        for start, block in blocks_of(weight, len(targets)):
            logits = hidden @ block.T if kept is None else kept  # [N, B]
            found.add(head_kernels.to_gradient_(logits, targets - start, sums, scale), block, start)
        return found.of_hidden(), found.of_weight, None, None, None, None
