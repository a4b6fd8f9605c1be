"""How much each transcript of a micro-batch counts: its share of the loss, and of how far the step goes.

    weighting = weighted_mean(examples, terms)     # the rule of every new version
    loss = sum over trained tokens of factor * nll; the optimizer's step is multiplied with step_scale

An optimizer that normalises its step undoes any factor on the gradient. So the gradient is that of a weighted mean,
whose size does not depend on the weights' size, and what weights and slopes say about the whole batch multiplies the
step: a loss that vanishes lets the step vanish.

Must not know: the optimizer.
Invariants: the rules are numbered and a number never changes its meaning: the journal names the rule of each version.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worker.data.examples import Example
from worker.trainer.losses import Term


@dataclass(frozen=True)
class Weighting:
    """Of one micro-batch, by the order of its examples."""

    factors: torch.Tensor
    """fp32 [examples, 2], on the host: what the NLL of each trained token is multiplied with in the loss: of an
    example's asked or rated turns, and of its rejected answer."""
    step_scale: float
    """What the optimizer's step is multiplied with, after everything that normalises it."""
    denominator: float
    """What the weighted sum of all tokens' losses is divided by."""
    effective_tokens: float
    """As many tokens of equal weight average as much noise away: (sum w)^2 / sum w^2 over trained tokens."""

    def loss(self, examples: Sequence[Example], losses: Sequence[float]) -> float:
        """The micro-batch's loss from each example's mean loss, in fp64."""
        both = zip(examples, losses, strict=True)
        return sum(one.weight * loss * one.trained_tokens for one, loss in both) / self.denominator


Rule = Callable[[Sequence[Example], Sequence[Term]], Weighting]


def weighted_mean(examples: Sequence[Example], terms: Sequence[Term]) -> Weighting:
    """The gradient is the mean over trained tokens, weighted by weight times |slope|; the step is multiplied with the
    mean of weight times |slope|.

    A lone transcript of weight .5 has the gradient of one of weight 1, and its step is half as long. In fp64, so that
    the smallest weights keep their ratios.
    """
    both = list(zip(examples, terms, strict=True))
    total = sum(one.weight * term.size(one.sides) for one, term in both)
    slopes = [(one.weight * term.slope, one.weight * term.rejected_slope) for one, term in both]
    factors = torch.tensor(slopes, dtype=torch.float64)  # [examples, 2]
    if total > 0:  # else every slope is 0: nothing is left to learn
        factors /= total
    tokens = sum(one.trained_tokens for one in examples)
    weights = sum(one.weight * one.trained_tokens for one in examples)
    return Weighting(factors.float(), total / tokens, weights, _effective_tokens(examples, slopes))


def unscaled(examples: Sequence[Example], terms: Sequence[Term]) -> Weighting:
    """The first rule, for replays alone: weighted sum over unweighted count, whose step hardly follows the weights."""
    tokens = sum(one.trained_tokens for one in examples)
    slopes = [(one.weight, 0.0) for one in examples]
    factors = torch.tensor(slopes, dtype=torch.float32) / tokens  # [examples, 2]
    return Weighting(factors, 1.0, tokens, _effective_tokens(examples, slopes))


RULES: dict[int, Rule] = {1: unscaled, 2: weighted_mean, 3: weighted_mean, 4: weighted_mean, 5: weighted_mean}
"""By the format number of the journal's records; those of before there were numbers are 1. Records of 2 hold
demonstrations alone, for which 3 is the same to the last bit. Records of 4 may hold what has a teacher; 5 is 4
for a batch that was divided among replicas. The losses of
`worker.trainer.losses`, with their constants, are those of 4; those of 3 among them have not changed."""


def _effective_tokens(examples: Sequence[Example], slopes: Sequence[tuple[float, float]]) -> float:
    parts = [
        (abs(slope), count)
        for one, both in zip(examples, slopes, strict=True)
        for slope, count in zip(both, one.sides, strict=True)
    ]
    most = max(weight for weight, _ in parts)
    if most == 0:
        return 0.0
    shares = [(weight / most, count) for weight, count in parts]
    return sum(w * n for w, n in shares) ** 2 / sum(w * w * n for w, n in shares)
