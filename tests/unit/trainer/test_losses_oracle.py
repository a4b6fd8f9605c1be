"""Losses by kind against the numbers of TRL 1.16's trainers on the same tiny logits. TRL is an oracle: no dependency.

- correction: `CPOTrainer`, loss_type "simpo", with `cpo_alpha` for the chosen answer's likelihood: its `cpo_loss`,
  `get_batch_logps(average_log_prob=True)`, and the sum in `get_batch_loss_metrics`.
- disliked: no trainer has SimNPO. It is SimPO with gamma = 0 beside a chosen answer that is certain (log p = 0), which
  `CPOTrainer.cpo_loss` can be asked for.
- comment, distilled: SDFT's divergence, in tests/unit/model/test_loss.py.
- demonstration, liked: the mean cross entropy, as every trainer has it.

No number of `DPOTrainer` or `KTOTrainer` is comparable: both compare with a reference model, which Tandem has not, and
KTO's loss is 1 - sigmoid of a log-ratio less the KL of a batch. SDPO is there as a part of online training, from
rewards. That the trainer's gradients on a model are those of these formulas: test_losses.py.
"""

import pytest
import torch
from torch import Tensor

from worker.trainer.losses import Answers, Term
from worker.trainer.losses.likelihood import likelihood
from worker.trainer.losses.preference import BETA, GAMMA, preference
from worker.trainer.losses.terms import SHARE
from worker.trainer.losses.unlearning import unlearning

MEANS = (-0.5513922247581456, -0.2803314237079096)
"""TRL's mean log p of both answers."""
SIMPO, SIMPO_NORMS = 2.0634839775619493, (0.4324159800968121, 0.21965308199669945)
"""Its loss for beta 2.5 and simpo_gamma 1.25, and the L2 norms of its gradients by each answer's logits."""
WHOLE, WHOLE_NORMS = 4.360951580720889, (1.2579625207625258, 0.21965308199669945)
"""The same with cpo_alpha = 2 beta n_c / (SHARE n) = 25 / 6."""
NPO, NPO_NORMS = (0.22471120322995483, 0.40291119888529553), (0.09968629963611386, 0.08344115213167971)
"""Each answer as the rejected one, beta 2.5, simpo_gamma 0, beside a chosen log p of 0."""


def tiny() -> tuple[Tensor, list[Tensor]]:
    """Logits [2, 9, 40] in fp64, and log p of each answer's trained tokens: 5 of the chosen, 7 of the rejected one."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(2, 9, 40, generator=generator, dtype=torch.float64).float().double()
    labels = torch.randint(40, (2, 9), generator=generator)
    for answer, likely in enumerate((4.0, 5.0)):
        for at in range(8):
            logits[answer, at, labels[answer, at + 1]] += likely
    logits.requires_grad_()
    each = logits[:, :-1].log_softmax(2).gather(2, labels[:, 1:, None])[..., 0]
    return logits, [each[0, 2:7], each[1, 1:]]


def norms(term: Term, logits: Tensor, log_p: list[Tensor]) -> list[float]:
    """L2 norms of the gradients that the trainer makes of a term's slopes, by each answer's logits."""
    (-term.slope * log_p[0].sum() - term.rejected_slope * log_p[1].sum()).backward(retain_graph=True)
    assert logits.grad is not None
    found = [float(of.norm()) for of in logits.grad]
    logits.grad = None
    return found


def test_the_mean_log_probabilities_are_trl_s() -> None:
    assert [float(each.detach().mean()) for each in tiny()[1]] == pytest.approx(MEANS, rel=1e-12)


def test_a_correction_is_trl_s_simpo_with_the_likelihood_of_the_chosen_answer() -> None:
    logits, log_p = tiny()
    n_c, n_r = map(len, log_p)
    n = n_c + n_r
    assert (BETA, GAMMA, 2 * BETA * n_c / (SHARE * n)) == (2.5, 1.25, pytest.approx(25 / 6))
    term = preference(Answers(n_c, MEANS[0], n_r, MEANS[1]))
    ours = SHARE * n / (2 * BETA)  # n * loss, over TRL's
    assert n * term.loss == pytest.approx(ours * WHOLE, rel=1e-12)
    assert norms(term, logits, log_p) == pytest.approx([ours * norm for norm in WHOLE_NORMS], rel=1e-12)
    alone = term._replace(slope=term.slope - 1)  # without the likelihood, whose slope is 1
    assert n * term.loss + n_c * MEANS[0] == pytest.approx(ours * SIMPO, rel=1e-12)
    assert norms(alone, logits, log_p) == pytest.approx([ours * norm for norm in SIMPO_NORMS], rel=1e-12)


@pytest.mark.parametrize("answer", [0, 1])
def test_a_dislike_is_trl_s_simpo_beside_an_answer_that_is_certain(answer: int) -> None:
    logits, log_p = tiny()
    n = len(log_p[answer])
    term = unlearning(Answers(n, MEANS[answer]))
    ours = SHARE * 2 / BETA  # loss, over TRL's
    assert term.loss == pytest.approx(ours * NPO[answer], rel=1e-12)
    found = norms(term, logits, [log_p[answer], log_p[1 - answer]])[answer]
    assert found == pytest.approx(n * ours * NPO_NORMS[answer], rel=1e-12)


def test_a_demonstration_is_the_cross_entropy_of_every_trainer() -> None:
    term = likelihood(Answers(5, MEANS[0]))
    assert (term.loss, term.slope) == (-MEANS[0], 1)
    assert 25 / 6 * term.loss == pytest.approx(WHOLE - SIMPO, rel=1e-12), "as CPOTrainer adds it"
