"""Losses by kind of feedback: against float64 transcriptions of the papers' formulas, and on the weights they move."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.checkpoint import model_directory
from worker.checkpoint.batch_codec import make_ready, pack_batch, unpack_batch
from worker.checkpoint.records import UpdateRecord
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.memory.plan import Way
from worker.model.output_head import head_of
from worker.model.soft_targets import TOP
from worker.trainer.factory import make_builder, make_trainer
from worker.trainer.losses import BY_KIND, Answers, Kind, has_teacher, imitates
from worker.trainer.losses.preference import preference
from worker.trainer.losses.unlearning import unlearning
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup

H = Hyperparameters(lr=1e-3, max_length=256)
QUESTION = {"role": "user", "content": "What do bees make?"}
GOOD, BAD = "They make honey, and wax.", "Bees make nothing that anybody has ever heard of."


def answered(text: str) -> list[dict[str, Any]]:
    return [QUESTION, {"role": "assistant", "content": text}]


FEEDBACK: dict[Kind, dict[str, Any]] = {
    "demonstration": {"messages": answered(GOOD)},
    "liked": {"messages": answered(GOOD), "rating": 0.5},
    "disliked": {"messages": answered(BAD), "rating": -1},
    "correction": {"messages": [QUESTION], "chosen": GOOD, "rejected": BAD},
    "comment": {"messages": answered(BAD), "comment": "Say it in fewer words."},
    "distilled": {"messages": answered(GOOD), "method": "distill"},
}


def formula(kind: Kind, chosen: Tensor, rejected: Tensor) -> Tensor:
    """n * loss from log-probabilities of tokens, written down from the papers once more."""
    if kind == "disliked":  # half of SimNPO: -2/beta log sigmoid(-beta/|y| log p(y) - gamma), gamma = 0
        return -len(chosen) / 2.5 * logsigmoid(-2.5 * chosen.mean())
    if kind == "correction":  # half of SimPO, beta = 2.5, gamma = 1.25, and the likelihood of the chosen answer
        simpo = -logsigmoid(2.5 * chosen.mean() - 2.5 * rejected.mean() - 1.25)
        return -chosen.sum() + (len(chosen) + len(rejected)) * simpo / 10
    return -chosen.sum()


LOG_P = st.lists(st.floats(-60, -1e-6), min_size=1, max_size=9)


@given(kind=st.sampled_from(sorted(kind for kind in BY_KIND if not has_teacher(kind))), chosen=LOG_P, rejected=LOG_P)
def test_losses_and_slopes_are_those_of_the_formulas(kind: Kind, chosen: list[float], rejected: list[float]) -> None:
    a, b = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (chosen, rejected))
    others = len(b) if kind == "correction" else 0
    total = formula(kind, a, b)
    total.backward()
    answers = Answers(len(a), float(a.detach().mean()), others, float(b.detach().mean()) if others else 0.0)
    term = BY_KIND[kind](answers)
    assert term.loss * answers.all_tokens == pytest.approx(float(total.detach()), rel=1e-9, abs=1e-12)
    assert a.grad is not None and torch.allclose(-a.grad, torch.full_like(a, term.slope), rtol=1e-9, atol=1e-12)
    if others:
        assert b.grad is not None and torch.allclose(-b.grad, torch.full_like(b, term.rejected_slope), rtol=1e-9)
    bound = {"correction": 1.5, "disliked": 0.5}.get(kind, 1)
    assert 0 <= term.size((answers.tokens, others)) / answers.all_tokens <= bound + 1e-9


def test_what_is_unlearnt_or_preferred_enough_stops_moving_anything() -> None:
    slopes = [unlearning(Answers(10, log_p)).slope for log_p in (0.0, -1.0, -2.0, -3.0, -1000.0)]
    assert slopes == pytest.approx([-0.5, -0.076, -0.0067, -0.0006, 0], abs=2e-4)
    ahead = [preference(Answers(10, -0.1, 10, log_p)) for log_p in (-0.1, -1.0, -4.0, -1000.0)]
    assert [term.rejected_slope for term in ahead] == pytest.approx([-0.389, -0.135, -0.0001, 0], abs=1e-3)
    assert [term.slope for term in ahead] == pytest.approx([1.389, 1.135, 1.0001, 1], abs=1e-3)


# -- on a model ----------------------------------------------------------------------------------------------------


def fresh(model_dir: Path, h: Hyperparameters = H, way: Way = "burst") -> Trainer:
    model, tokenizer = model_directory.load(model_dir, torch.float32)
    return make_trainer(model, model.named_parameters(), tokenizer, h, state=None, way=way, by_factors=512)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> dict[Kind, Example]:
    torch_setup.prepare()
    builder = make_builder(AutoTokenizer.from_pretrained(tiny_model), tiny_model, H)
    return {kind: builder.build(Transcript.from_dict(item), kind) for kind, item in FEEDBACK.items()}


def log_p(trainer: Trainer, example: Example) -> list[Tensor]:
    """Of each trained token, by transformers' own forward pass and log-softmax: one tensor for each answer."""
    found: list[list[Tensor]] = [[], []]
    for sequence in example.sequences:
        logits = trainer.model(input_ids=torch.tensor([sequence.ids])).logits[0].double()
        each = logits[:-1].log_softmax(1).gather(1, torch.tensor(sequence.ids[1:])[:, None])[:, 0]
        found[sequence.rejected].append(each[torch.tensor(sequence.mask[1:])])
    return [torch.cat(of) if of else torch.zeros(0, dtype=torch.float64) for of in found]


def next_words(trainer: Trainer, sequences: Sequence[TokenSequence]) -> Tensor:
    """log p of every word where a trained token comes, by transformers' own forward pass: [n, V] in fp64."""
    found = []
    for sequence in sequences:
        logits = trainer.model(input_ids=torch.tensor([sequence.ids])).logits[0].double()
        found.append(logits[:-1].log_softmax(1)[torch.tensor(sequence.mask[1:])])
    return torch.cat(found)


def lumped(log_p: Tensor, ids: Tensor) -> Tensor:
    """Of the words `ids` and of all others together."""
    return torch.cat([log_p.gather(1, ids), log_p.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)], 1)


def divergence(trainer: Trainer, example: Example) -> tuple[Tensor, float]:
    """n * loss of what has a teacher, and the sum over its tokens of the probability that is to move; in fp64."""
    with torch.no_grad():
        teacher = next_words(trainer, example.teachers)
    ids = teacher.topk(TOP, 1).indices
    q, p = lumped(teacher, ids), lumped(next_words(trainer, example.sequences), ids)
    return (q.exp() * (q - p)).sum(), float((q.exp() - p.exp()).abs().sum().detach()) / 2


@pytest.mark.parametrize("kinds", [*([kind] for kind in FEEDBACK), list(FEEDBACK)], ids=[*FEEDBACK, "mixed"])
def test_the_gradient_is_autograd_s_of_the_formula(
    tiny_model: Path, examples: dict[Kind, Example], kinds: list[Kind]
) -> None:
    """Through transformers' own logits, summed by weights, and divided by the sum of weight times |slope|."""
    trainer = fresh(tiny_model)
    found = trainer.begin([examples[kind] for kind in kinds])
    ours = gradients(trainer)
    trainer.forget()
    total, sizes = torch.zeros((), dtype=torch.float64), 0.0
    for kind in kinds:
        if has_teacher(kind):
            loss, size = divergence(trainer, examples[kind])
            total, sizes = total + loss, sizes + size
            continue
        chosen, rejected = log_p(trainer, examples[kind])
        leaves = [part.detach().requires_grad_() for part in (chosen, rejected)]
        formula(kind, *leaves).backward()
        slopes = sum(float(leaf.grad.abs().sum()) for leaf in leaves if leaf.grad is not None)
        sizes += examples[kind].weight * slopes
        total = total + examples[kind].weight * formula(kind, chosen, rejected)
    (total / sizes).backward()
    flat = [torch.cat([of[name].flatten() for name in ours]).double() for of in (ours, gradients(trainer))]
    assert float(flat[1].norm()) > 0
    assert float((flat[0] - flat[1]).norm()) < 1e-4 * float(flat[1].norm())
    trained = sum(examples[kind].trained_tokens for kind in kinds)
    assert found.step_scale == pytest.approx(sizes / trained, rel=1e-5)
    weights = sum(examples[kind].weight * examples[kind].trained_tokens for kind in kinds)
    assert found.loss == pytest.approx(float(total.detach()) / weights, rel=1e-5, abs=1e-7)


def moved(trainer: Trainer, batch: list[Example]) -> float:
    """The L2 norm of what one step changes."""
    before = [p.detach().clone() for p in trainer.parameters()]
    trainer.begin(batch)
    trainer.apply()
    return math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(trainer.parameters(), before, strict=True))
    )


def test_a_loss_that_vanishes_lets_the_step_vanish(tiny_model: Path, examples: dict[Kind, Example]) -> None:
    """The optimizer normalises gradients, whatever their size: the update itself must follow the slope."""
    full = moved(fresh(tiny_model), [examples["demonstration"]])
    disliked, steps, slopes = examples["disliked"], [], []
    trainer = fresh(tiny_model, dataclasses.replace(H, lr=1e-2))
    for _ in range(12):
        mean = -trainer.score([disliked])[disliked.id]
        slopes.append(-unlearning(Answers(disliked.trained_tokens, mean)).slope)
        steps.append(moved(trainer, [disliked]))
    assert slopes == sorted(slopes, reverse=True), "each step makes it less likely, and moves less"
    assert steps[0] == pytest.approx(10 * full * slopes[0], rel=0.2), "lr times the slope"
    assert all(step < 20 * full * slope for step, slope in zip(steps, slopes, strict=True))


def test_a_teacher_that_is_shown_nothing_more_moves_nothing(tiny_model: Path, examples: dict[Kind, Example]) -> None:
    """As where a comment changes nothing: the optimizer must not make a full step of rounding errors."""
    same = dataclasses.replace(examples["comment"], teachers=examples["comment"].sequences)
    full = moved(fresh(tiny_model), [examples["demonstration"]])
    assert moved(fresh(tiny_model), [same]) < 1e-4 * full
    assert 0 < moved(fresh(tiny_model), [examples["comment"]]) < full


def test_beside_a_teacher_the_student_comes_nearer(tiny_model: Path, examples: dict[Kind, Example]) -> None:
    """Nearer to the teacher of before, that is: the same weights, told more."""
    for kind in ("comment", "distilled"):
        example, trainer = examples[kind], fresh(tiny_model)
        with torch.no_grad():
            then = next_words(trainer, example.teachers).exp()
            far = [(next_words(trainer, example.sequences).exp() - then).abs().sum()]
            for _ in range(3):
                with torch.enable_grad():
                    trainer.begin([example])
                trainer.apply()
                far.append((next_words(trainer, example.sequences).exp() - then).abs().sum())
        assert far[-1] < far[0], kind


def test_the_drift_is_the_divergence_from_what_was_expected(tiny_model: Path, examples: dict[Kind, Example]) -> None:
    some, trainer = [examples["demonstration"], examples["disliked"]], fresh(tiny_model)
    then = trainer.expectations(some)
    assert list(trainer.drift(some, then).values()) == pytest.approx([0, 0], abs=1e-6)
    with torch.no_grad():
        before = [next_words(trainer, one.sequences) for one in some]
    trainer.begin([examples["correction"]])
    trainer.apply()
    for one, q, found in zip(some, before, trainer.drift(some, then).values(), strict=True):
        ids = q.topk(TOP, 1).indices
        with torch.no_grad():
            q, p = lumped(q, ids), lumped(next_words(trainer, one.sequences), ids)
        assert 1e-6 < found == pytest.approx(float((q.exp() * (q - p)).sum(1).mean()), rel=1e-2)


def test_a_dislike_takes_from_its_answer_and_a_correction_prefers(
    tiny_model: Path, examples: dict[Kind, Example]
) -> None:
    disliked, correction = examples["disliked"], examples["correction"]
    trainer = fresh(tiny_model)
    before = trainer.score([disliked])[disliked.id]
    for _ in range(3):
        trainer.begin([disliked])
        trainer.apply()
    assert trainer.score([disliked])[disliked.id] > before
    trainer = fresh(tiny_model)
    leads = []
    for _ in range(4):
        with torch.no_grad():
            chosen, rejected = log_p(trainer, correction)
        leads.append(float(chosen.mean() - rejected.mean()))
        trainer.begin([correction])
        trainer.apply()
    assert leads == sorted(leads) and leads[-1] > leads[0]


@pytest.mark.parametrize("way", ["streaming", "factors"])
def test_every_way_of_applying_makes_the_same_step(tiny_model: Path, examples: dict[Kind, Example], way: Way) -> None:
    burst, other = fresh(tiny_model), fresh(tiny_model, way=way)
    for trainer in (burst, other):
        for batch in (list(examples.values()), [examples["disliked"]]):
            trainer.begin(batch)
            assert trainer.begun == trainer.way
            trainer.apply()
    for (name, ours), theirs in zip(burst.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_a_limit_on_losses_is_for_what_is_imitated(tiny_model: Path, examples: dict[Kind, Example]) -> None:
    """What is disliked or corrected is expected to be surprising."""

    class Low:
        def loss_limit(self) -> float:
            return 0.01

        def loss_reason(self, loss: float) -> str:
            return f"{loss:.3f} is too much"

        def refusal(self, kind: Kind, answers: Answers) -> str | None:
            return None

    found = fresh(tiny_model).begin(list(examples.values()), Low())
    assert set(found.nll) == set(found.losses) == {kind for kind in FEEDBACK if not imitates(kind)}
    assert set(found.rejected) == {kind for kind in FEEDBACK if imitates(kind)}
    assert all("is too much" in reason for reason in found.rejected.values())


@pytest.mark.parametrize("kind", FEEDBACK)
def test_what_is_not_finite_is_left_out_and_the_others_are_trained(
    tiny_model: Path, examples: dict[Kind, Example], kind: Kind
) -> None:
    """Also where the rejected answer alone is to blame."""
    trainer = fresh(tiny_model)
    other = make_builder(AutoTokenizer.from_pretrained(tiny_model), tiny_model, H).build(
        Transcript.from_dict(
            {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
        ),
        "other",
    )
    known = {token for sequence in other.sequences for token in sequence.ids}
    where = examples[kind].sequences[-1]
    poisoned = next(t for t, trained in zip(where.ids, where.mask, strict=True) if trained and t not in known)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[poisoned] = math.inf
        trainer.model.lm_head.weight = torch.nn.Parameter(torch.ones_like(trainer.model.lm_head.weight))
    trainer.head = head_of(trainer.model)
    found = trainer.begin([examples[kind], other])
    assert set(found.rejected) == {kind} and "not finite" in found.rejected[kind] and set(found.nll) == {"other"}


def test_the_journal_keeps_the_kind_and_which_answer_was_rejected(examples: dict[Kind, Example]) -> None:
    ready = [make_ready(Transcript.from_dict(FEEDBACK[kind]), one) for kind, one in examples.items()]
    record = UpdateRecord(1, "l", 0, 0, [r.id for r in ready], pack_batch(ready), {})
    back = unpack_batch(record, frozenset({"liked"}))
    assert back == [dataclasses.replace(one, report={}) for kind, one in examples.items() if kind != "liked"]
    assert [Transcript.from_dict(r.transcript).kind for r in ready] == list(FEEDBACK)
