"""An answer that was disliked: made less likely, by less and less as it becomes unlikely.

SimNPO, negative preference optimization without a reference (arXiv 2410.07163, equation 4), gamma = 0, times SHARE:

    loss = SHARE * -2/beta log sigmoid(-beta m),   m = 1/n sum_t log p(y_t)
    d loss / d m = SHARE * 2 sigmoid(beta m)

The derivative is SHARE for an answer that is certain, .15 of it at m = -1 nat a token, .001 at -3: what has been
unlearnt moves the weights no more, however often it is disliked. The optimizer's moments still see its gradient at full
size: slopes scale the step alone. The mean over an answer's tokens stands for all of them. Unlikelihood (Welleck 2019)
would drive each token down to zero, also the words that all answers have in common.
"""

from worker.trainer.losses.terms import SHARE, Answers, Term, log_sigmoid, sigmoid

BETA = 2.5
"""As in the paper's experiments. Constants of losses are part of the journal's format: `worker.trainer.weighting`."""


def unlearning(answers: Answers) -> Term:
    """Of the turns that were disliked."""
    margin = BETA * answers.log_p
    return Term(SHARE * -2 / BETA * log_sigmoid(-margin), SHARE * -2 * sigmoid(margin))
