"""What users said of an answer, in whatever column and shape: a dislike never becomes an answer to give."""

import json
from typing import Any

import pytest
from import_parts import lines, read

from producer.formats import Reason
from producer.formats.rating_names import Says, says
from producer.transcript import Transcript

ALPACA = {"instruction": "q", "output": "BAD"}
TRL = {"prompt": "q", "completion": "BAD"}
RUN = {"id": "r", "inputs": {"messages": [{"role": "user", "content": "q"}]}, "outputs": {"output": "BAD"}}
TRACE = {"id": "t", "input": "q", "output": "BAD"}


def outcome(row: dict[str, Any]) -> str | float | None:
    """The rating, "demonstration", or why it is left out."""
    source, found = read(lines(row))
    if not found:
        (reason,) = source.left_out
        return reason.name
    ((_, item),) = found
    assert isinstance(item, Transcript), item
    return item.kind if item.rating is None else item.rating


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({"feedback": {"user_score": 0}}, -1.0),
        ({"feedback": {"user_score": 1}}, 1.0),
        ({"feedback": {"thumbs": "down"}}, -1.0),
        ({"feedback": [{"user_score": 0}]}, -1.0),
        ({"feedback": [{"thumbs": "up"}, {"thumbs": "down"}]}, "NEUTRAL"),
        ({"feedback": {"user_score": {"score": 0}}}, -1.0),
        ({"feedback": {"user_score": {"rating": -1}}}, -1.0),
        ({"feedback": {"comment": "hm", "thumbs_down": True}}, -1.0),
        ({"feedback": json.dumps([{"key": "user_score", "score": 0}])}, -1.0),
        ({"feedback": [{"key": "user_score", "score": 1, "feedback_source": {"type": "api"}}]}, 1.0),
        ({"feedback": 0}, -1.0),
        ({"feedback_stats": json.dumps({"user_score": {"n": 1, "avg": 0.0}})}, -1.0),
        ({"feedback_stats": {"user_score": {"n": 1, "mean": 0.0}}}, -1.0),
        ({"feedback_stats": {"user_score": {"n": 4, "mean": 0.75}}}, "NEUTRAL"),
        ({"feedback_stats": {"user_score": 0}}, -1.0),
        ({"feedback_stats": {"score": {"n": 1, "avg": 1.0}}}, 1.0),
        ({"feedback_stats": [{"key": "user_score", "n": 1, "avg": 0.0}]}, -1.0),
        ({"feedback_stats": {"user_score": {}}}, "UNRATED"),
        ({"feedback_stats": {"user_score": {"n": 1}}}, "UNRATED"),
        ({"feedback_stats": {"user_score": None}}, "UNRATED"),
        ({"feedback": [{"key": "user_score"}]}, "UNRATED"),
        ({"feedback": [{"key": "thumbs_down", "score": 0}]}, "UNRATED"),
        ({"feedback": [{}]}, "UNRATED"),
        ({"feedback": [], "feedback_stats": {}}, "demonstration"),
    ],
)
def test_feedback_of_langsmith_in_any_shape(said: dict[str, Any], means: Any) -> None:
    assert outcome(RUN | said) == means


@pytest.mark.parametrize(
    ("scores", "means"),
    [
        ([{"name": "user-feedback", "value": None}], "UNRATED"),
        (json.dumps([{"name": "user-feedback", "value": 0}]), -1.0),
        ({"user-feedback": {"value": 0}}, -1.0),
        ([{"name": "is_disliked", "value": 1}, {"name": "user-feedback", "value": 1}], "NEUTRAL"),
        ([{"name": "feedback_reason", "value": None, "stringValue": "too long"}], "SCORED"),
        ([], "demonstration"),
    ],
)
def test_scores_of_langfuse_in_any_shape(scores: Any, means: Any) -> None:
    assert outcome(TRACE | {"scores": scores}) == means


AGAINST = (
    "thumb_down", "thumbDown", "downvotes", "is_disliked", "isDisliked", "user_disliked",
    "dislike_count", "negative_feedback", "NEGATIVE_FEEDBACK", "down_votes", "not_liked",
)  # fmt: skip
FOR = ("upvotes", "is_liked", "isLiked", "thumb_up", "thumbUp", "is_accepted", "positive_feedback", "is_helpful")
SIGNED = (
    "feedback_score", "human_feedback_score", "user_feedback_score", "userFeedbackScore", "user_feedback_rating",
    "user_vote", "customer-rating", "HUMAN_SCORES",
)  # fmt: skip


@pytest.mark.parametrize("row", [ALPACA, TRL])
def test_a_column_is_a_rating_by_the_words_of_its_name(row: dict[str, Any]) -> None:
    assert {name: outcome(row | {name: True}) for name in AGAINST} == dict.fromkeys(AGAINST, -1.0)
    assert {name: outcome(row | {name: False}) for name in FOR} == dict.fromkeys(FOR, "NEUTRAL")
    assert {name: outcome(row | {name: True}) for name in (*FOR, *SIGNED)} == dict.fromkeys((*FOR, *SIGNED), 1.0)
    assert {name: outcome(row | {name: False}) for name in SIGNED} == dict.fromkeys(SIGNED, -1.0)
    assert {name: outcome(row | {name: "too long"}) for name in (*AGAINST, *FOR, *SIGNED)} == dict.fromkeys(
        (*AGAINST, *FOR, *SIGNED), "UNRATED"
    ), "what such a column says is not known"
    assert outcome(row | {"feedback_text": "too long", "rating": 1}) == 1.0


@pytest.mark.parametrize(
    "name", ["likelihood", "score_chosen", "chosen_rating", "rating_id", "likedAt", "source", "scores", "overall_score"]
)
def test_a_column_that_only_sounds_like_a_rating_is_none(name: str) -> None:
    assert says(name) is None and outcome(ALPACA | {name: 7}) == "demonstration"


def test_names_in_the_lists_mean_what_they_did() -> None:
    assert (says("User-Score"), says("accepted"), says("Dislike")) == (Says.SIGNED, Says.FOR, Says.AGAINST)


@pytest.mark.parametrize("said", [{"rejected": True}, {"chosen": False}, {"is_rejected": 1}, {"isChosen": "False"}])
def test_an_answer_that_was_rejected_without_another_is_left_out(said: dict[str, Any]) -> None:
    for row in (TRL, ALPACA, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "BAD"}]}):
        source, found = read(lines(row | said))
        assert (found, source.left_out) == ([], {Reason.NEUTRAL: 1})
    assert outcome(TRL | {"rejected": False}) == "demonstration"


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ({"thumbs_up": False, "thumbs_down": True}, -1.0),
        ({"likes": 0, "dislikes": 1}, -1.0),
        ({"likes": 0, "dislikes": 12}, -1.0),
        ({"upvotes": 12, "downvotes": 0}, 1.0),
        ({"likes": 3, "dislikes": 1}, "NEUTRAL"),
        ({"liked": False, "rating": 1}, "NEUTRAL"),
        ({"rating": 0, "thumbs_down": True}, "NEUTRAL"),
    ],
)
def test_likes_and_their_opposite_together(said: dict[str, Any], means: Any) -> None:
    assert outcome(ALPACA | said) == means
    assert outcome(RUN | {"feedback": {"thumbs_up": 0, "thumbs_down": 1}}) == -1.0


HUMAN = {"type": "human", "content": "q"}


@pytest.mark.parametrize("name", ["finish_reason", "stop_reason"])
@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_was_cut_off_is_left_out_wherever_it_is_said(name: str, reason: str) -> None:
    said = {name: reason}
    fields = {"content": "BAD", "response_metadata": said}
    message = {"lc": 1, "type": "constructor", "id": ["AIMessage"], "kwargs": fields}
    role = {"role": "assistant", "content": "BAD"}
    for outputs in (
        {"messages": [HUMAN, {"type": "ai"} | fields]},
        {"messages": [[{"type": "ai"} | fields]]},
        {"output": {"type": "ai", "data": fields}},
        {"generations": [[{"text": "BAD", "message": message}]]},
        {"generations": [[{"text": "BAD", "generation_info": said}]]},
        {"choices": [{"message": role} | said]},
        {"content": "BAD"} | said,
    ):
        assert outcome({"id": "r", "inputs": {"messages": [HUMAN]}, "outputs": outputs}) == "CUT_OFF"
    for output in (role | said, [role | said], json.dumps(role | said), role | {"response_metadata": said}):
        assert outcome(TRACE | {"output": output}) == "CUT_OFF"
    assert outcome(TRACE | {"output": role | {name: "stop"}}) in ("demonstration", None)


def test_tools_that_cannot_be_read_are_an_error() -> None:
    for row in (ALPACA, TRL, {"input": {"messages": [HUMAN]}, "output": "a"}):
        inner = row["input"] if isinstance(row.get("input"), dict) else row
        for tools, fine in (("[not json", False), ("search", False), ("[]", True), ("", True), (None, True)):
            given = row | {"tools": tools} if inner is row else row | {"input": inner | {"tools": tools}}
            ((_, item),) = read(lines(given))[1]
            assert isinstance(item, Transcript) == fine
            assert fine or str(item).startswith("tools: is a string that is not JSON")


@pytest.mark.timeout(60)
def test_a_long_text_that_looks_like_a_mark_of_litellm_is_read() -> None:
    """In no time; where the rest is looked through from each place, in hours."""
    answer = {"choices": [{"message": {"role": "assistant", "content": "a"}}]}
    for text in ("(litellm_truncated " + "1" * 3_000_000, "(litellm_truncated " * 150_000):
        row = {"id": "x", "messages": [{"role": "user", "content": text}], "response": answer}
        assert outcome(row) == "demonstration"
    for text in ("... (litellm_truncated 12345 chars)", "(litellm_truncated skipped 7 chars) ..."):
        row = {"id": "x", "messages": [{"role": "user", "content": text}], "response": answer}
        assert outcome(row) == "REDACTED"
