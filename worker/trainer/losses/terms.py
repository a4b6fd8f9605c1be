"""What a loss is given, and what it gives. Plain numbers in fp64."""

import math
from typing import NamedTuple

SHARE = 0.5
"""How far an answer that is not wanted pushes away, compared with how far a demonstration pulls: what not to say tells
less. Part of the journal's format, as all constants of losses are. DESIGN.md, "Losses by kind", has what was measured.
"""


class Answers(NamedTuple):
    """Trained tokens of one transcript, and their mean log-probability in nats: of the turns that are asked for or
    rated, and of the answer that was rejected (0 tokens where there is none)."""

    tokens: int
    log_p: float
    rejected_tokens: int = 0
    rejected_log_p: float = 0.0
    divergence: float = 0.0
    """From a teacher, in nats; a mean over the tokens, as is `moved`: the part of the probability that lies elsewhere
    with it."""
    moved: float = 0.0

    @property
    def all_tokens(self) -> int:
        """Of both."""
        return self.tokens + self.rejected_tokens


class Term(NamedTuple):
    """One transcript's part of the batch's loss. n: its trained tokens, of both answers."""

    loss: float
    """Mean over the n tokens, in nats."""
    slope: float = 1.0
    """-d(n * loss) / d log p of each trained token; below 0 the token is made less likely."""
    rejected_slope: float = 0.0
    """The same, of each token of the rejected answer."""
    share: float = 1.0
    """How far the step goes, beside the slopes: with a teacher, the part of the probability that is to move."""

    def size(self, counts: tuple[int, int]) -> float:
        """Sum of |slope| over the trained tokens, which are `counts` of the two answers, times `share`: n for the
        likelihood."""
        return (counts[0] * abs(self.slope) + counts[1] * abs(self.rejected_slope)) * self.share


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
