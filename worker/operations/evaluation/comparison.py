"""Two versions on the same conversations: the differences, in pairs, with 95 % intervals.

An interval is a bootstrap over conversations: `DRAWS` sets of as many, drawn with replacement, each compared as the
whole is; its bounds are the 2.5th and 97.5th percentiles. So conversations that are hard at both versions widen
nothing.
Must not know: torch.
Invariants: conversations are compared with themselves alone; the draws follow from a fixed seed, so that the same
scores give the same interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from producer.errors import TandemError
from worker.versions.evaluations import Score

DRAWS = 2000
SEED = 0
LOW, HIGH = 2.5, 97.5
NUMBERS = 2_000_000
"""Draws of conversations that are in memory at once."""


class ComparisonError(TandemError):
    """The two are not of the same conversations."""


@dataclass(frozen=True)
class Difference:
    """before, after: of the whole set. low, high: the interval of after - before; None for fewer than two
    conversations. count: conversations that it is of."""

    before: float
    after: float
    low: float | None
    high: float | None
    count: int

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Comparison:
    """loss: in nats a token. exact, won: rates from 0 to 1; None where not both were asked, or there are no pairs.
    better, worse: how many conversations' loss fell, or rose, by more than `SAME`."""

    loss: Difference
    exact: Difference | None
    won: Difference | None
    better: int
    worse: int


SAME = 1e-4
"""Nats a token that are taken for noise: a server computes in bf16, in batches of whatever runs beside."""


def compare(before: Sequence[Score], after: Sequence[Score]) -> Comparison:
    """`before` and `after` are of the same conversations in the same order. Raises `ComparisonError`."""
    if len(before) != len(after) or any(a.tokens != b.tokens for a, b in zip(before, after, strict=False)):
        raise ComparisonError("the two versions were evaluated on different conversations: they cannot be compared")
    tokens = [float(score.tokens) for score in before]
    loss = _difference([score.nll for score in before], [score.nll for score in after], tokens)
    changes = [b.loss - a.loss for a, b in zip(before, after, strict=True)]
    return Comparison(
        loss=loss,
        exact=_rates([score.exact for score in before], [score.exact for score in after]),
        won=_rates([score.won for score in before], [score.won for score in after]),
        better=sum(change < -SAME for change in changes),
        worse=sum(change > SAME for change in changes),
    )


def _rates(before: Sequence[bool | None], after: Sequence[bool | None]) -> Difference | None:
    """Of those that both have."""
    both = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if not both:
        return None
    return _difference([float(a) for a, _ in both], [float(b) for _, b in both], [1.0] * len(both))


def _difference(before: Sequence[float], after: Sequence[float], weights: Sequence[float]) -> Difference:
    """Of the sums of `before` and `after` over those of `weights`."""
    was, now, size = np.array(before), np.array(after), np.array(weights)  # each [conversations]
    low = high = None
    if len(was) > 1:
        change = now - was
        random, drawn = np.random.default_rng(SEED), np.empty(DRAWS)
        at_once = max(1, NUMBERS // len(was))
        for start in range(0, DRAWS, at_once):
            draw = random.integers(len(was), size=(len(drawn[start : start + at_once]), len(was)))
            drawn[start : start + at_once] = change[draw].sum(1) / size[draw].sum(1)
        low, high = (float(bound) for bound in np.percentile(drawn, [LOW, HIGH]))
    return Difference(float(was.sum() / size.sum()), float(now.sum() / size.sum()), low, high, len(was))
