"""Examples of what was rated, corrected or commented on: their weight, and the answers of both sides."""

from dataclasses import replace
from typing import Any

import pytest
from examples_parts import QUESTIONS, TEMPLATES, TOKENIZER, build, builder, runs, trained

from producer.transcript import Transcript
from worker.data.examples import ExampleError


def test_a_rating_weighs_and_is_about_the_last_answer() -> None:
    example = build(QUESTIONS, rating=-0.5, weight=0.5)
    assert (example.kind, example.weight, example.report["kind"]) == ("disliked", 0.25, "disliked")
    assert trained(example) == ["Answer 5: the capital of France is Paris.<|im_end|>"]
    assert "kind" not in build(QUESTIONS).report


@pytest.mark.parametrize("limit", [115, 150, 4096])
@pytest.mark.parametrize("more", [0, 30], ids=["the chosen is longer", "the rejected is longer"])
def test_both_answers_of_a_correction_follow_the_same_messages(limit: int, more: int) -> None:
    """Also where only the longer one has to begin later to fit."""
    words = "no " * more + "never."
    example = builder(max_tokens=limit).build(Transcript(messages=QUESTIONS, rejected=words), "t")
    (context, chosen), (other, rejected) = runs(example)
    assert context == other and [sequence.rejected for sequence in example.sequences] == [False, True]
    assert TOKENIZER.decode(chosen) == "Answer 5: the capital of France is Paris.<|im_end|>"
    assert TOKENIZER.decode(rejected) == words + "<|im_end|>"
    assert example.sides == (len(chosen), len(rejected)) and example.trained_tokens == sum(example.sides)
    assert max(len(sequence.ids) for sequence in example.sequences) <= limit
    with pytest.raises(ExampleError, match="rejected with its context has"):
        builder(max_tokens=100).build(Transcript(messages=QUESTIONS, rejected="no " * 40), "t")


def test_a_weight_that_is_hardly_there_is_not_zero() -> None:
    """A batch of nothing else would have no mean."""
    assert 0 < build(QUESTIONS, rating=-1e-200, weight=1e-200).weight < 1e-300


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize(
    "fields", [{"comment": "Say it in French."}, {"method": "distill"}], ids=["comment", "distill"]
)
def test_a_teacher_reads_the_same_answers_after_the_question_with_more(template: str, fields: dict[str, Any]) -> None:
    example = build(QUESTIONS, template, **fields)
    own, taught = list(runs(example)), list(runs(replace(example, sequences=example.teachers)))
    assert [answer for _, answer in own] == [answer for _, answer in taught]
    assert len(own) == (1 if "comment" in fields else 6) and example.sides == (sum(len(a) for _, a in own), 0)
    for (before, answer), (more, _) in zip(own, taught, strict=True):
        said = (
            "Say it in French." if "comment" in fields else TOKENIZER.decode(answer).removesuffix("<|im_end|>").strip()
        )
        extra = TOKENIZER.decode(more)
        assert len(more) > len(before) and extra.count(said) == TOKENIZER.decode(before).count(said) + 1
    assert example.report["teacher_tokens"] == example.teacher_tokens == sum(len(s.ids) for s in example.teachers)


def test_what_does_not_fit_beside_a_comment_is_dropped_for_both_or_refused() -> None:
    whole = build(QUESTIONS, comment="Shorter.")
    limit = len(whole.sequences[0].ids) + 1  # the student's fits, the teacher's does not
    assert len(whole.teachers[0].ids) > limit
    (short,) = [builder(max_tokens=limit).build(Transcript(messages=QUESTIONS, comment="Shorter."), "t")]
    assert short.report["dropped_messages"] == 2 and len(short.teachers[0].ids) <= limit
    assert len(short.sequences[0].ids) < len(whole.sequences[0].ids), "both see the same messages"
    with pytest.raises(ExampleError, match="messages\\[12\\], with its comment, with its context has"):
        builder(max_tokens=limit, overlong="reject").build(Transcript(messages=QUESTIONS, comment="Shorter."), "t")
