"""What a teacher expects as the next token: its most likely words, and all others lumped into one.

    soft = teacher_targets(hidden, head)        # of the teacher's pass, without gradients
    head_loss(..., soft=soft.at(rows, which))   # for the student's

The vocabulary is gone through in blocks, as by the loss: no [tokens, vocabulary] array stands anywhere.

Must not know: examples, the optimizer.
Invariant: the K + 1 probabilities of a token add up to one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.model.head_blocks import PLAIN, After, blocks_of, logits_of
from worker.model.vocabulary_shard import VocabularyShard

TOP = 64
"""Words of a teacher that are told apart; TRL's default is 100. Part of the journal's format: a replay computes them
again."""
LEAST = 1e-7
"""The least probability of all others together: what fp32 can tell from 0 beside a sum of 1."""


@dataclass(frozen=True)
class Soft:
    """M tokens' distributions."""

    rows: Tensor
    """int64 [M]: which of a pass' trained tokens they are of, each once."""
    ids: Tensor
    """int64 [M, K]: the words that are told apart."""
    log_q: Tensor
    """fp32 [M, K + 1]: their log-probabilities, and that of all others together."""

    def at(self, rows: Tensor, which: Tensor) -> "Soft":
        """The distributions `which` [m], for the tokens `rows` [m] of another pass; all on this one's device."""
        return Soft(rows, self.ids[which], self.log_q[which])

    def within(self, start: int, height: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which of `ids` are rows of the head's block of `height` rows from `start` on, bool [M, K]; and the place of
        each in the block's logits, [M, 1] and [M, K], somewhere in it for the others."""
        listed = (self.ids >= start) & (self.ids < start + height)
        return listed, (self.rows[:, None], (self.ids - start).clamp(0, height - 1))


@torch.no_grad()
def teacher_targets(
    hidden: Tensor, weight: Tensor, after: After = PLAIN, vocabulary: VocabularyShard | None = None
) -> Soft:
    """hidden: [M, H], the last states before each token; weight: the head's [V, H]; after: what follows their product.
    vocabulary: which rows of it `weight` has, where it is one process's part. NaN where hidden is not finite."""
    count = min(TOP, (len(weight) if vocabulary is None else vocabulary.words) - 1)
    sums = torch.full((len(hidden),), -torch.inf, device=hidden.device)  # [M]
    best = torch.zeros(len(hidden), 0, device=hidden.device)  # the largest logits so far [M, <= K]
    ids = torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    for start, block in blocks_of(weight, len(hidden)):
        logits = logits_of(hidden, block, start, after)  # [M, B]
        sums = torch.logaddexp(sums, logits.logsumexp(1))
        values, columns = logits.topk(min(count, len(block)), 1)
        both, places = torch.cat([best, values], 1), torch.cat([ids, columns + start], 1)
        best, chosen = both.topk(min(count, both.shape[1]), 1)
        ids = places.gather(1, chosen)
    if vocabulary is not None:
        sums = vocabulary.log_sum_exp(sums)
        best, ids = vocabulary.most_likely(best, ids, count)
    log_q = best - sums[:, None]  # [M, K]
    known = log_q.logsumexp(1, keepdim=True).clamp(max=-LEAST)
    others = torch.log(-torch.expm1(known))
    return Soft(torch.arange(len(hidden), device=hidden.device), ids, torch.cat([log_q, others], 1))
