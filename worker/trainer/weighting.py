"""How much each transcript of a micro-batch counts: its share of the loss, and of how far the step goes.

    weighting = weighted_mean(examples)     # the rule of every new version
    loss = sum over trained tokens of factor * nll; the optimizer's step is multiplied with step_scale

An optimizer that normalises its step undoes any factor on the gradient. So the gradient is that of a weighted mean,
whose size does not depend on the weights' size, and what the weights say about the whole batch multiplies the step.

Must not know: the optimizer.
Invariants: the rules are numbered and a number never changes its meaning: the journal names the rule of each version.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from worker.data.examples import Example


@dataclass(frozen=True)
class Weighting:
    """Of one micro-batch, by the order of its examples."""

    factors: torch.Tensor
    """fp32 [examples], on the host: what the NLL of each trained token of an example is multiplied with in the loss."""
    step_scale: float
    """What the optimizer's step is multiplied with, after everything that normalises it."""
    denominator: float
    """What the weighted sum of all tokens' NLL is divided by."""

    def loss(self, examples: Sequence[Example], nll: Mapping[str, float]) -> float:
        """The micro-batch's loss from each example's mean NLL, in fp64."""
        return sum(one.weight * nll[one.id] * one.trained_tokens for one in examples) / self.denominator


Rule = Callable[[Sequence[Example]], Weighting]


def weighted_mean(examples: Sequence[Example]) -> Weighting:
    """The loss is the weighted mean over trained tokens; the step is multiplied with the mean weight of one.

    A lone transcript of weight .5 has the gradient of one of weight 1, and its step is half as long. In fp64, so that
    the smallest weights keep their ratios.
    """
    total = sum(one.weight * one.trained_tokens for one in examples)
    tokens = sum(one.trained_tokens for one in examples)
    factors = torch.tensor([one.weight / total for one in examples], dtype=torch.float64)
    return Weighting(factors.float(), total / tokens, total)


def unscaled(examples: Sequence[Example]) -> Weighting:
    """The first rule, for replays alone: weighted sum over unweighted count, whose step hardly follows the weights."""
    tokens = sum(one.trained_tokens for one in examples)
    weights = torch.tensor([one.weight for one in examples], dtype=torch.float32)
    return Weighting(weights / tokens, 1.0, tokens)


RULES: dict[int, Rule] = {1: unscaled, 2: weighted_mean}
"""By the format number of the journal's records; those of before there were numbers are 1."""


def effective_tokens(examples: Sequence[Example]) -> float:
    """How many tokens of equal weight average as much noise away: (sum w)^2 / sum w^2 over trained tokens."""
    most = max(one.weight for one in examples)
    shares = [(one.weight / most, one.trained_tokens) for one in examples]
    return sum(w * n for w, n in shares) ** 2 / sum(w * w * n for w, n in shares)
