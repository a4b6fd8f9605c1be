"""An answer that was disliked: made less likely, by less and less as it becomes unlikely.

SimNPO, negative preference optimization without a reference (arXiv 2410.07163, equation 4), gamma = 0, times SHARE:

    loss = SHARE * -2/beta log sigmoid(-beta m),   m = 1/n sum_t log p(y_t)
    d loss / d m = SHARE * 2 sigmoid(beta m)

The derivative is SHARE for an answer that is certain, .15 of it at m = -1 nat a token, .001 at -3: what has been
unlearnt moves the weights no more, however often it is disliked. (The optimizer's moments do see its gradient, whose
size they are told nothing of, as with any weight.) The mean over an answer's tokens stands for all of them,
so that the words which any answer has in common are not each driven down to zero, as unlikelihood (Welleck 2019) would.
"""

from worker.trainer.losses.terms import Answers, Term, log_sigmoid, sigmoid

BETA = 2.5
"""As in the paper's experiments. Constants of losses are part of the journal's format: `worker.trainer.weighting`."""
SHARE = 0.5
"""How far an answer pushes away, compared with how far a demonstration pulls: what not to say tells less. Measured in
DESIGN.md, "Losses by kind"."""


def unlearning(answers: Answers) -> Term:
    """Of the turns that were disliked."""
    margin = BETA * answers.log_p
    return Term(SHARE * -2 / BETA * log_sigmoid(-margin), SHARE * -2 * sigmoid(margin))
