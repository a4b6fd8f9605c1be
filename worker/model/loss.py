"""Output head and loss in one, without the logits standing in memory as a whole where they are many.

For 8,192 tokens and 248,320 words the logits are 4 GB in bf16 and 8 GB in fp32, and their gradient is as much again.
Here the vocabulary is gone through in blocks: once for every token's log-sum-exp, and once more in backward for the
gradients, which are therefore rounded to the weights' dtype once, however many blocks there are.

On a GPU the plain case is `plain_head_loss`, which keeps the logits of a short row for backward.

Two losses, for different tokens of one pass: the cross entropy with the token that came, and the divergence from a
teacher's distribution (`worker.model.soft_targets`).

Where the vocabulary is divided over processes (`worker.model.vocabulary_shard`), each goes through its own rows; the
sums, the target's logit and the gradient of the hidden states are added up over them.

Must not know: examples, the optimizer.
Invariants: the loss of each token is that of `cross_entropy(head(hidden).float())` up to the order of sums, where the
head does what the model's own forward does after the hidden states (`worker.model.output_head`); nothing of size [N, V]
outlives a block; no gradient is computed that nobody asked for; on a CPU, without a teacher, or without anything after
the product with the matrix, not a bit is other.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.model import plain_head_loss as plain
from worker.model.head_blocks import PLAIN, After, blocks_of, logits_of
from worker.model.head_gradients import HeadGradients, Keep
from worker.model.soft_targets import Soft
from worker.model.vocabulary_shard import VocabularyShard


class HeadLoss(NamedTuple):
    """What the head makes of N tokens, M of them with a teacher."""

    loss: Tensor
    """sum_i factors[i] * (nll[i], or the divergence of a token with a teacher): fp32 scalar, the only part that is
    differentiable."""
    nll: Tensor
    """fp32 [N]: of the token that came."""
    divergence: Tensor
    """fp32 [M]: KL(teacher | student) over the teacher's most likely words and all others as one, in nats."""
    moved: Tensor
    """fp32 [M]: the probability that lies elsewhere with the teacher, half the sum of |q - p|, from 0 to 1."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, keep: Keep | None = None
) -> tuple[Tensor, Tensor]:
    """`head_loss` without a teacher: the loss and the nll."""
    return head_loss(hidden, weight, targets, factors, keep)[:2]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor,
    keep: Keep | None = None,
    soft: Soft | None = None,
    after: After = PLAIN,
    vocabulary: VocabularyShard | None = None,
) -> HeadLoss:
    """hidden: [N, H]; weight: the head's [V, H], of the same dtype; targets: int64 [N]; factors: fp32 [N].

    keep: in backward it gets, block by block, what the head's gradient is the product of; the head then gets none.
    soft: which of the tokens have a teacher, and what it expects there. after: what follows the product. vocabulary:
    which rows of the head `weight` has (and the bias of `after`), where it is one process's part; targets and words of
    a teacher are those of the whole.
    """
    if vocabulary is not None:
        targets = vocabulary.local(targets)
        soft = None if soft is None else replace(soft, ids=vocabulary.local(soft.ids))
    if soft is None and plain.takes(hidden, after):
        loss, nll = plain.plain_head_loss(hidden, weight, targets, factors, keep, vocabulary)
        return HeadLoss(loss, nll, nll.new_zeros(0), nll.new_zeros(0))
    return HeadLoss(*_HeadLoss.apply(hidden, weight, after.bias, targets, factors, keep, soft, after, vocabulary))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factors: Tensor,
        keep: Keep | None,
        soft: Soft | None,
        after: After,
        vocabulary: VocabularyShard | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = torch.arange(len(targets), device=hidden.device)  # [N]
        sums = torch.full((len(targets),), -torch.inf, device=hidden.device)  # log-sum-exp so far [N]
        own = torch.zeros_like(sums)  # the target's logit [N]
        top = None if soft is None else torch.zeros_like(soft.log_q[:, :-1])  # the listed words' logits [M, K]
        for start, block in blocks_of(weight, len(targets)):
            logits = logits_of(hidden, block, start, after)  # [N, B]
            inside = (targets >= start) & (targets < start + len(block))  # [N]
            column = (targets - start).clamp(0, len(block) - 1)
            if soft is None or top is None:
                sums = torch.logaddexp(sums, logits.logsumexp(1))
                own = torch.where(inside, logits[rows, column], own)
                continue
            own = torch.where(inside, logits[rows, column], own)
            listed, at = soft.within(start, len(block))  # bool, and where in the block: [M, K]
            top = torch.where(listed, logits[at], top)
            logits.index_put_(at, torch.where(listed, -torch.inf, 0.0), accumulate=True)  # what is left: all others
            sums = torch.logaddexp(sums, logits.logsumexp(1))
        if vocabulary is not None:
            sums, own = vocabulary.log_sum_exp(sums), vocabulary.total(own)
            top = None if top is None else vocabulary.total(top)
        ctx.keep, ctx.soft, ctx.after, ctx.vocabulary = keep, soft, after, vocabulary
        if soft is None or top is None:
            nll = sums - own
            ctx.save_for_backward(hidden, weight, targets, factors, sums)
            none = nll.new_zeros(0)
            ctx.mark_non_differentiable(nll, none)
            return (nll * factors).sum(), nll, none, none
        others = sums[soft.rows]  # [M]
        sums = sums.index_copy(0, soft.rows, torch.logaddexp(others, top.logsumexp(1)))
        nll = sums - own
        log_p = torch.cat([top, others[:, None]], 1) - sums[soft.rows, None]  # [M, K + 1]
        divergence = (soft.log_q.exp() * (soft.log_q - log_p)).sum(1)
        moved = (soft.log_q.exp() - log_p.exp()).abs().sum(1) / 2
        ctx.save_for_backward(hidden, weight, targets, factors, sums, log_p)
        ctx.mark_non_differentiable(nll, divergence, moved)
        return (nll.index_copy(0, soft.rows, divergence) * factors).sum(), nll, divergence, moved

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Of a logit z_j with a teacher: p_j - q_j where the word is listed; else r_j (p_r - q_r), where p_r and q_r
        are the probabilities of all others together, and r_j is that of the word among them."""
        hidden, weight, targets, factors, sums = ctx.saved_tensors[:5]
        soft: Soft | None = ctx.soft
        after: After = ctx.after
        *wanted, to_bias = ctx.needs_input_grad[:3]
        found = HeadGradients(hidden, weight, wanted, ctx.keep, ctx.vocabulary)
        d_bias = torch.empty_like(after.bias) if to_bias and after.bias is not None else None  # [V]
        scale = (factors * outer * after.scale)[:, None]  # [N, 1]
        rows = torch.arange(len(targets), device=hidden.device)
        plain = pull = None
        if soft is not None:
            log_p = ctx.saved_tensors[5]  # [M, K + 1]
            pull = (log_p.exp() - soft.log_q.exp()) * scale[soft.rows]
            plain = torch.ones_like(targets, dtype=torch.bool).index_fill_(0, soft.rows, False)
            scale = scale.index_copy(0, soft.rows, pull[:, -1:])
            sums = sums.index_add(0, soft.rows, log_p[:, -1])  # of all others alone
        for start, block in blocks_of(weight, len(targets)):
            logits = logits_of(hidden, block, start, after)  # [N, B]
            slope = after.slope(logits)
            inside = (targets >= start) & (targets < start + len(block))
            column = (targets - start).clamp(0, len(block) - 1)
            if soft is None or pull is None or plain is None:
                p = logits.sub_(sums[:, None]).exp_()
                p[rows, column] -= inside.float()
                p.mul_(scale)
            else:
                listed, at = soft.within(start, len(block))
                logits.index_put_(at, torch.where(listed, -torch.inf, 0.0), accumulate=True)
                p = logits.sub_(sums[:, None]).exp_()
                p[rows, column] -= (inside & plain).float()
                p.mul_(scale).index_put_(at, torch.where(listed, pull[:, :-1], 0.0), accumulate=True)
            if slope is not None:
                p.mul_(slope)
            d_logits = p.to(hidden.dtype)  # [N, B]
            if d_bias is not None:
                d_bias[start : start + len(block)] = p.sum(0)
            found.add(d_logits, block, start)
        return found.of_hidden(), found.of_weight, d_bias, None, None, None, None, None, None
