"""Imitation: the negative log-likelihood of the answer. For demonstrations and for answers that were liked.

loss = -1/n sum_t log p(y_t)
"""

from worker.trainer.losses.terms import Answers, Term


def likelihood(answers: Answers) -> Term:
    """Of the turns that are trained."""
    return Term(-answers.log_p)
