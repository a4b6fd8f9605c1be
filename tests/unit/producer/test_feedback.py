"""Ratings and corrections as fields of a transcript."""

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import AsyncProducer, Producer
from producer.errors import InvalidTranscriptError
from producer.transcript import FIELDS, Transcript

QUESTION = {"role": "user", "content": "What do bees make?"}
HONEY = {"role": "assistant", "content": "Honey."}


def made(**fields: Any) -> Transcript:
    return Transcript.from_dict({"messages": [QUESTION, HONEY]} | fields)


@pytest.mark.parametrize(
    ("rating", "kept", "kind"),
    [
        (True, 1.0, "liked"),
        (1, 1.0, "liked"),
        (0.25, 0.25, "liked"),
        (False, -1.0, "disliked"),
        (-0.5, -0.5, "disliked"),
    ],
)
def test_a_rating_makes_an_answer_liked_or_disliked(rating: Any, kept: float, kind: str) -> None:
    transcript = made(rating=rating)
    assert (transcript.rating, transcript.kind) == (kept, kind)
    assert transcript.to_dict() == {"messages": [QUESTION, HONEY], "train_on": "last", "rating": kept}
    assert made().kind == "demonstration" and "rating" not in made().to_dict()


@pytest.mark.parametrize(
    ("rating", "says"),
    [(0, "neither"), (5, "five stars"), (-1.01, "five stars"), (float("nan"), "between"), ("up", "true, false"),
     ([1], "true, false")],
)  # fmt: skip
def test_what_is_no_rating_is_refused_by_name(rating: Any, says: str) -> None:
    with pytest.raises(InvalidTranscriptError, match=says) as caught:
        made(rating=rating)
    assert caught.value.field == "rating"


def test_a_rating_is_about_the_last_answer_unless_others_are_named() -> None:
    turns = [QUESTION, HONEY, {"role": "user", "content": "And wasps?"}, {"role": "assistant", "content": "Paper."}]
    assert made(messages=turns).train_on == "all"
    assert made(messages=turns, rating=-1).train_on == "last"
    assert made(messages=turns, rating=-1, train_on=[1]).train_on == [1]
    assert made(messages=turns, rejected="Honey too.").train_on == "last"
    assert made(messages=turns, rejected="Honey too.", train_on=(3,)).train_on == [3]
    with pytest.raises(InvalidTranscriptError, match="train_on: names other turns"):
        made(messages=turns, rejected="Honey too.", train_on=[1])


@pytest.mark.parametrize("chosen", ["Honey.", HONEY, [HONEY]])
@pytest.mark.parametrize("rejected", ["Nothing.", {"role": "assistant", "content": "Nothing."}, ["Nothing."]])
def test_a_correction_is_the_conversation_with_the_chosen_answer_and_the_rejected_one(
    chosen: Any, rejected: Any
) -> None:
    transcript = Transcript.from_dict({"messages": [QUESTION], "chosen": chosen, "rejected": rejected})
    assert transcript.kind == "correction" and transcript.messages == [QUESTION, HONEY]
    assert transcript.rejected == {"role": "assistant", "content": "Nothing."}
    assert Transcript.from_dict(transcript.to_dict()) == transcript == made(rejected=rejected)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"chosen": "x"}, "chosen: comes without rejected"),
        ({"chosen": "x", "rejected": "y"}, "messages: end with an answer"),
        ({"messages": [QUESTION], "rejected": "y"}, "chosen: is missing"),
        ({"rejected": "Honey."}, "rejected: is the very answer"),
        ({"rejected": QUESTION}, "rejected: must be one answer"),
        ({"rejected": [HONEY, HONEY]}, "rejected: must be one answer"),
        ({"rejected": 3}, "rejected: must be one answer"),
        ({"rejected": {"content": 3}}, "rejected.content: must be a string"),
        ({"rejected": {"content": "x", "audio": {"id": "a"}}}, "rejected.audio: "),
        ({"rejected": "<think>\nx"}, "rejected.content: opens reasoning"),
        ({"rejected": "x", "rating": -1}, "rating: comes beside rejected"),
        ({"rejected": ""}, "rejected: is empty"),
        ({"rejected": {"content": " "}}, "rejected: is empty"),
        ({"messages": [QUESTION], "chosen": HONEY | {"weight": 0}, "rejected": "y"}, "chosen.weight: is 0"),
    ],
)
def test_what_is_no_correction_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTranscriptError) as caught:
        made(**fields)
    assert str(caught.value).startswith(says), str(caught.value)


def test_a_comment_is_about_the_last_answer_and_distill_about_all() -> None:
    turns = [QUESTION, HONEY, QUESTION, HONEY]
    comment = made(messages=turns, comment="  Be shorter. ")
    assert (comment.kind, comment.comment, comment.train_on) == ("comment", "Be shorter.", "last")
    distilled = made(messages=turns, method="distill")
    assert (distilled.kind, distilled.train_on) == ("distilled", "all")
    assert made(messages=turns, method="imitate") == made(messages=turns) and made().kind == "demonstration"
    for transcript in (comment, distilled):
        assert Transcript.from_dict(transcript.to_dict()) == transcript


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"comment": 3}, "comment: must be the text that was said"),
        ({"comment": "  "}, "comment: is empty"),
        ({"comment": "x" * 8193}, "comment: has 8193 characters"),
        ({"comment": "x", "rating": -1}, "comment: comes beside rating"),
        ({"comment": "x", "rejected": "y"}, "comment: comes beside rejected"),
        ({"comment": "x", "messages": [HONEY]}, "comment: needs a user message"),
        ({"method": "distill", "messages": [HONEY]}, "method: needs a user message"),
        ({"method": "rl"}, 'method: must be "imitate"'),
        ({"method": ["distill"]}, 'method: must be "imitate"'),
        ({"method": "distill", "comment": "x"}, 'method: "distill" is for demonstrations'),
        ({"method": "distill", "rating": 1}, 'method: "distill" is for demonstrations'),
    ],
)
def test_what_is_no_comment_and_no_method_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidTranscriptError) as caught:
        made(**fields)
    assert str(caught.value).startswith(says), str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)


@given(
    rating=ANYTHING,
    chosen=ANYTHING,
    rejected=ANYTHING,
    comment=ANYTHING,
    method=ANYTHING | st.just("distill"),
    train_on=st.sampled_from(["all", "last", [1], [0]]),
)
def test_anything_in_these_fields_is_kept_or_refused(**fields: Any) -> None:
    try:
        transcript = made(**{name: value for name, value in fields.items() if value is not None})
    except InvalidTranscriptError as error:
        assert error.field.split("[")[0].split(".")[0] in {*fields, "messages"}
        return
    assert Transcript.from_dict(transcript.to_dict()) == transcript


@pytest.mark.parametrize("method", [Producer.enqueue, AsyncProducer.enqueue])
def test_every_field_of_a_transcript_is_an_argument_of_enqueue(method: Any) -> None:
    assert set(inspect.signature(method).parameters) - {"self"} == set(FIELDS)
