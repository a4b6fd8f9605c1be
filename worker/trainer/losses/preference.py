"""A correction: the chosen answer is imitated, and preferred to the rejected one until it leads by a margin.

SimPO, preference without a reference (arXiv 2405.14734, equation 6), with the chosen answer's likelihood beside it
(as in CPO, arXiv 2401.08417, equation 5), because a preference alone may make both answers less likely:

    simpo = -log sigmoid(beta (m_c - m_r) - gamma),        m = mean log p of an answer's tokens
    n loss = n_c (-m_c) + SHARE n / (2 beta) simpo,        n = n_c + n_r trained tokens

With equal lengths and c = SHARE sigmoid(gamma - beta (m_c - m_r)), a chosen token has slope 1 + c, a rejected one -c.
"""

from worker.trainer.losses.terms import SHARE, Answers, Term, log_sigmoid, sigmoid

BETA = 2.5
GAMMA = 1.25
"""Half of beta, within what the paper tried."""


def preference(answers: Answers) -> Term:
    """Of the chosen and the rejected answer."""
    n, chosen, rejected = answers.all_tokens, answers.tokens, answers.rejected_tokens
    lead = BETA * (answers.log_p - answers.rejected_log_p) - GAMMA
    push = SHARE * sigmoid(-lead) * n / 2
    loss = -answers.log_p * chosen / n - SHARE * log_sigmoid(lead) / (2 * BETA)
    return Term(loss, 1 + push / chosen, -push / rejected)
