"""What is minimised, by kind of feedback: one file a loss, beside its paper's formula.

In come an answer's mean log-probabilities under the present weights; out go the loss and its slopes, by which the
trainer multiplies each token's gradient. A loss here is a function of the tokens' log p, and its gradient is the sum of
(d loss / d log p) times the gradient of log p: so all are trained by the one cross entropy of `worker.model.loss`. With
a teacher it is the divergence from the teacher's distribution, which `worker.model.loss` has too.

Must not know: torch, the model, the optimizer.
Invariants: of a transcript with n trained tokens, `loss` is a mean over them, and `slopes` are of n * loss. A slope is
1 for the negative log-likelihood; the mean of |slope| over the trained tokens is at most 1.5.
"""

from collections.abc import Mapping
from typing import Protocol

from producer.feedback import Kind
from worker.trainer.losses.distillation import distillation
from worker.trainer.losses.likelihood import likelihood
from worker.trainer.losses.preference import preference
from worker.trainer.losses.terms import Answers, Term
from worker.trainer.losses.unlearning import unlearning

__all__ = ["BY_KIND", "Answers", "Kind", "Term", "has_teacher", "imitates"]


class Loss(Protocol):
    """Of one transcript."""

    def __call__(self, answers: Answers) -> Term:
        """Its loss and slopes."""


BY_KIND: Mapping[Kind, Loss] = {
    "demonstration": likelihood,
    "distilled": distillation,
    "liked": likelihood,
    "disliked": unlearning,
    "correction": preference,
    "comment": distillation,
}


def imitates(kind: Kind) -> bool:
    """Whether it is the negative log-likelihood, whose slope is 1 whatever the weights: no answer is scored for it."""
    return BY_KIND[kind] is likelihood


def has_teacher(kind: Kind) -> bool:
    """Whether it is the divergence from a teacher: `Example.teachers` says what that reads."""
    return BY_KIND[kind] is distillation
