"""What the trained tokens of each example add up to: likelihood, and with a teacher the divergence from it.

Must not know: the optimizer, Redis, versions.
Invariant: sums are fp64, on the host, in the order of the passes.
"""

from collections.abc import Sequence

import torch

from worker.data.examples import Example
from worker.data.packing import Batch
from worker.model.loss import HeadLoss
from worker.trainer.losses import Answers
from worker.trainer.teachers import Teachers


class TokenSums:
    """Of `examples`, by their order."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.nll = torch.zeros(len(examples), 2, dtype=torch.float64)
        """[examples, 2]: of what is asked for or rated, and of a rejected answer."""
        self.taught = torch.zeros(len(examples), 2, dtype=torch.float64)
        """[examples, 2]: divergence from the teacher, and the probability that lies elsewhere with it."""

    def add(self, batch: Batch, found: HeadLoss, teachers: Teachers) -> None:
        """What one pass found for the tokens of `batch`."""
        self.nll.view(-1).index_add_(0, 2 * batch.examples + batch.rejected, found.nll.detach().cpu().double())
        if len(found.divergence):
            both = torch.stack([found.divergence, found.moved], 1).detach().cpu().double()  # [M, 2]
            self.taught.index_add_(0, batch.examples[teachers.rows(batch)], both)

    def clear(self) -> None:
        """All zero."""
        self.nll.zero_()
        self.taught.zero_()

    def fine(self) -> torch.Tensor:
        """bool [examples]: all of it is finite."""
        return torch.isfinite(self.nll).all(1) & torch.isfinite(self.taught).all(1)

    def means(self) -> list[float]:
        """Mean NLL of each example's trained tokens, but those of a rejected answer."""
        sums = self.nll[:, 0] + 0 * self.nll[:, 1]  # NaN where either is not finite
        return [total / one.sides[0] for one, total in zip(self.examples, sums.tolist(), strict=True)]

    def answers(self) -> list[Answers]:
        """What losses are given."""
        found = []
        for one, (asked, other), (divergence, moved) in zip(
            self.examples, self.nll.tolist(), self.taught.tolist(), strict=True
        ):
            tokens, others = one.sides
            found.append(
                Answers(tokens, -asked / tokens, others, -other / max(others, 1), divergence / tokens, moved / tokens)
            )
        return found
