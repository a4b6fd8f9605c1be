"""Outliers are set aside, on a real tiny model, and the bounds by which they are told."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from few_words import Room, conversation, learn_the_words, open_room, weights_of

from producer import Transcript
from producer.errors import TandemError
from worker.trainer.grad_norm import gradient_norm
from worker.trainer.losses import Answers
from worker.trainer.outliers import Guards, History
from worker.versions import ledger


def test_nothing_is_refused_before_enough_is_known_and_equal_values_leave_room() -> None:
    history = History(k=8, minimum=10, window=100)
    history.add([2.0] * 9 + [math.nan, math.inf])
    assert history.bound() == math.inf and len(history.values) == 9
    history.add([2.0])
    assert history.bound() == pytest.approx(2.0 + 8 * 0.05 * 2.0)
    assert History(k=0, minimum=1, window=5).bound() == math.inf


@pytest.mark.parametrize("outliers", [0, 1, 20])
def test_outliers_in_the_history_hardly_move_the_bound(outliers: int) -> None:
    dice = random.Random(3)
    history = History(k=8, minimum=10, window=1000)
    history.add(dice.gauss(2.0, 0.2) for _ in range(200))
    history.add([1e6] * outliers)
    assert 3.0 < history.bound() < 4.5


def test_a_restart_remembers_from_manifests_as_the_journal_and_as_redis_have_them() -> None:
    first, dice = Guards(minimum=8, window=64), random.Random(1)
    losses = [{f"t{i}": dice.gauss(3, 1) for i in range(4)} for _ in range(12)]
    manifests = [Guards.measures(nll, dice.gauss(9, 1), 50.0) for nll in losses]
    first.remember(manifests)
    from_journal, from_redis = Guards(minimum=8, window=64), Guards(minimum=8, window=64)
    from_journal.remember(manifests)
    from_redis.remember({name: str(ledger.flat(value)) for name, value in kept.items()} for kept in manifests)
    assert first.loss_limit() == from_journal.loss_limit() == from_redis.loss_limit() < math.inf
    refusals = [guards.norm_refusal(100.0) for guards in (first, from_journal, from_redis)]
    assert refusals[0] is not None and len(set(refusals)) == 1 and first.norm_refusal(9.0) is None
    from_redis.remember([{"losses": "[not json", "gradient_norm": "?", "effective_tokens": "?"}, {"losses": None}, {}])
    assert from_redis.loss_limit() == first.loss_limit()


@pytest.fixture(scope="module")
def room(tiny_model: Path) -> Iterator[Room]:
    """Its model has learnt the few words."""
    with open_room(tiny_model) as made:
        learn_the_words(made)
        yield made


def test_a_strange_transcript_is_an_outlier_to_a_model_that_learnt_others(
    room: Room,
) -> None:
    trainer, builder = room
    guards = Guards(k=8, minimum=32)
    known = trainer.score([builder.build(conversation(1000 + i), f"k{i}") for i in range(32)])
    guards.remember([Guards.measures(known)])
    strange = builder.build(conversation(1, words=("qzx", "0x7f", "}{][", "ÿþ", "%%@", "WvWv")), "strange")
    usual = builder.build(conversation(2000), "usual")
    losses = trainer.score([usual, strange])
    assert losses["usual"] <= guards.loss_limit() < losses["strange"]
    assert "set aside" in guards.loss_reason(losses["strange"]) and guards.refused == 1


def test_gradient_norm_is_that_of_all_gradients_together(room: Room) -> None:
    trainer, builder = room
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trainer.optimizer.zero_grad(set_to_none=True)
    assert gradient_norm(parameters) == 0.0
    before = weights_of(trainer)
    trainer.begin([builder.build(conversation(5), "five")])
    expected = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters if p.grad is not None))
    assert expected > 0 and gradient_norm(parameters) == pytest.approx(expected, rel=1e-4), "to fp32's sums"
    assert torch.equal(before, weights_of(trainer))
    guards = Guards(minimum=16)
    guards.remember([Guards.measures({}, expected, 8.0)] * 4)
    assert guards.norm_refusal(1.2 * expected) is None and "norm" in str(guards.norm_refusal(50 * expected))
    trainer.optimizer.zero_grad(set_to_none=True)


def test_a_small_batch_may_have_a_larger_gradient() -> None:
    guards, dice = Guards(minimum=16), random.Random(2)
    guards.remember({"gradient_norm": dice.gauss(4, 0.3), "effective_tokens": 100} for _ in range(40))
    assert guards.norm_refusal(9.6) is not None and guards.norm_refusal(9.6, 100) is not None
    assert guards.norm_refusal(9.6, 25) is None, "half the noise of four times the tokens"
    assert guards.norm_refusal(40.0, 25) is not None and guards.norm_refusal(9.6, 400) is not None


def test_a_new_fact_after_easy_ones_is_learnt_and_what_is_worse_than_a_guess_is_not() -> None:
    """Seen with an earlier rule: 6.6 nats a token after easy transcripts, where the limit was .83."""
    dice = random.Random(4)
    guards, blind = Guards(words=49152), Guards()
    for _ in range(40):
        manifest = Guards.measures({f"t{i}": dice.gauss(0.3, 0.05) for i in range(4)}, dice.gauss(1.0, 0.1), 100.0)
        guards.remember([manifest])
        blind.remember([manifest])
    assert blind.loss_limit() < 1 and 6.6 < guards.loss_limit() == pytest.approx(math.log(49152))
    assert guards.norm_refusal(12.0, 100, 6.6) is None, "its loss explains its gradient"
    assert guards.norm_refusal(12.0, 100, 0.3) is not None, "nothing explains it"
    assert guards.norm_refusal(60.0, 100, 6.6) is not None and guards.norm_refusal(12.0, 100) is not None
    guards.remember([Guards.measures({f"h{i}": 9.0 + i % 3 for i in range(600)})])
    assert guards.loss_limit() > 11, "where hard ones are usual, they are judged by those"


def test_what_a_comment_turns_round_altogether_is_refused() -> None:
    guards, far, near = (
        Guards(),
        Answers(9, -1.0, divergence=9.0, moved=0.95),
        Answers(9, -1.0, divergence=1, moved=0.5),
    )
    for kind, said in (("comment", "shown the comment"), ("distilled", "shown the demonstration")):
        assert said in str(guards.refusal(kind, far)) and guards.refusal(kind, near) is None  # type: ignore[arg-type]
    assert guards.refusal("disliked", far) is None and Guards(0).refusal("comment", far) is None


def test_what_the_guard_refuses_by_kind_is_left_out_and_the_rest_trained(room: Room) -> None:
    trainer, builder = room

    class NoComments(Guards):
        def refusal(self, kind: Any, answers: Answers) -> str | None:
            return f"{kind} of {answers.tokens} words" if kind == "comment" else None

    asked = conversation(6).to_dict()
    examples = [
        builder.build(Transcript.from_dict(asked | fields), id)
        for id, fields in (("c", {"comment": "one two"}), ("d", {"rating": -1}), ("e", {}))
    ]
    found = trainer.begin(examples, NoComments())
    trainer.forget()
    alone = trainer.begin(examples[1:])
    trainer.forget()
    assert found.rejected == {"c": f"comment of {examples[0].trained_tokens} words"}
    assert found.nll == alone.nll and found.shares == alone.shares and sum(found.shares.values()) == pytest.approx(1)


def test_norms_of_the_first_rule_are_forgotten() -> None:
    """They were smaller by the weights: with all at .5, every gradient of today would be an outlier, for ever."""
    guards = Guards(minimum=16)
    guards.remember({"gradient_norm": 2.0, "trained_tokens": 100, "losses": [1.0]} for _ in range(40))
    assert guards.norm_refusal(4.0, 100) is None and len(guards.losses.values) == 40


def test_bad_settings_are_refused() -> None:
    for settings in ({"k": -1.0}, {"minimum": 3}, {"minimum": 64, "window": 10}):
        with pytest.raises(TandemError, match="outliers"):
            Guards(**settings)
