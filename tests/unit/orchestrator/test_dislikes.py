"""The account of what dislikes have cost: what counts against them, what for them, and what a restart knows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from producer.errors import TandemError
from worker.data.examples import Example, ExampleBuilder, TokenSequence
from worker.orchestrator.dislikes import DislikeGuard
from worker.orchestrator.reference_set import reference_examples


def example(id: str, kind: str = "disliked", tokens: int = 3) -> Example:
    sequence = TokenSequence(tuple(range(tokens + 1)), (False,) + (True,) * tokens)
    return Example(id, (sequence,), 1.0, {}, kind)  # type: ignore[arg-type]


class Live:
    """Weights that are `at` some place on a line, and how often they were asked how far that is from another."""

    def __init__(self, at: float = 1.0) -> None:
        self.at, self.asked = at, 0

    def expectations(self, examples: Sequence[Example]) -> float:
        return self.at

    def drift(self, examples: Sequence[Example], then: float) -> dict[str, float]:
        self.asked += 1
        return {one.id: abs(self.at - then) for one in examples}


def guard(live: Live, bound: float = 0.3) -> DislikeGuard[float]:
    return DislikeGuard([example("a"), example("b", tokens=9)], lambda: live, bound)


BATCH = [example("down"), example("up", "liked"), example("down too")]


def test_dislikes_are_refused_once_they_have_moved_the_weights_by_the_bound_and_nothing_else_is() -> None:
    live = Live()
    ours = guard(live)
    manifests = []
    for version, moved in enumerate((0.1, 0.2), 1):
        assert ours.refusals(version - 1, BATCH) == {}
        live.at += 0.1
        manifests.append(ours.after(version, 1.0))
        assert manifests[-1] == {"dislikes_moved": pytest.approx(moved)}
    assert live.asked == 3, "what was scored after a version is known before the next"
    live.at += 0.15
    manifests.append(ours.after(3, 1.0))
    refused = ours.refusals(3, BATCH)
    assert set(refused) == {"down", "down too"}
    assert "by 0.350 nats a token (KL), and the bound is 0.3" in refused["down"] and "roll back" in refused["down"]
    assert ours.refusals(3, [BATCH[1]]) == {}
    for kept in (manifests, [{name: json.dumps(value) for name, value in one.items()} for one in manifests]):
        again = guard(live)
        again.relearn(kept)
        assert again.refusals(3, BATCH).keys() == refused.keys(), "a restart, from the journal or from Redis"
    again.relearn(manifests[:1])
    assert again.refusals(1, BATCH) == {}, "a rollback"


def test_only_their_share_of_a_step_counts_against_them_and_what_brings_the_weights_back_for_them() -> None:
    live = Live()
    ours = guard(live)
    ours.refusals(0, BATCH)
    live.at = 2.0
    assert ours.after(1, 0.2)["dislikes_moved"] == pytest.approx(0.2)
    live.at = 5.0
    assert ours.after(2, 0.0) == {"dislikes_moved": pytest.approx(0.2)}, "a version without: not scored, not charged"
    assert ours.refusals(2, BATCH) == {}
    live.at = 5.4
    assert ours.after(3, 1.0)["dislikes_moved"] == pytest.approx(0.6)
    assert ours.refusals(3, BATCH)
    live.at = 4.9  # liked answers did it
    assert ours.refusals(4, BATCH) == {} and ours.moved == pytest.approx(0.1)
    live.at = 4.0
    assert ours.refusals(5, BATCH) == {} and ours.moved == 0, "never below nothing"


def test_a_set_without_a_finite_loss_refuses_them() -> None:
    assert "no finite loss" in guard(Live(math.nan)).refusals(7, BATCH)["down"]


def test_settings_that_guard_nothing_are_refused() -> None:
    for bound, examples, says in ((0.0, [example("a")], "dislikes-bound"), (0.3, [], "--max-length")):
        with pytest.raises(TandemError, match=says):
            DislikeGuard(examples, Live, bound)


def test_our_reference_conversations_are_examples_of_any_model_that_has_room(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = reference_examples(ExampleBuilder(tokenizer, max_tokens=512))
    assert len(examples) == len({one.id for one in examples}) == 12
    assert all(one.kind == "demonstration" and one.trained_tokens > 3 for one in examples)
    assert len(reference_examples(ExampleBuilder(tokenizer, max_tokens=40))) < 12
