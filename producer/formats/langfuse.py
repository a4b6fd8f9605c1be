"""Langfuse's exports of traces and observations: {"input": ..., "output": ..., "scores": [...]}.

Read: the conversation in input, the answer in output, as OpenAI's or LangChain's messages or as text; tools; scores,
and the users of trace and scores. Left out: observations that failed, and those that are no call of a model. Columns
are named as the interface exports them (traceId) or as the export to a bucket does (trace_id).
"""

from typing import Any

from .. import users
from ..errors import InvalidTranscriptError
from ..plain import as_map, kind
from . import chat, ratings
from .record import LeaveOut, Reason, Record


def read(value: dict[str, Any]) -> Record:
    if value.get("level") == "ERROR":
        raise LeaveOut(Reason.FAILED)
    if value.get("type") not in (None, "GENERATION"):
        raise LeaveOut(Reason.NO_CHAT)
    given = chat.unpacked(value["input"])
    fields = chat.answered(chat.conversation(given, "input"), chat.answer(value["output"], "output"), "output")
    fields |= chat.tools_of(given)
    comments: list[str] = []
    marks = chat.parsed(value.get("scores"))
    scores = _scores(marks, comments)
    rating = ratings.together([ratings.of_scores(scores, "scores"), ratings.beside(value)])
    if rating is None and scores and all(mark is None for _, mark in scores):
        raise LeaveOut(Reason.UNRATED)
    named = users.beside(value, chat.parsed(value.get("metadata")), *(marks if isinstance(marks, list) else ()))
    return Record(fields=fields, id=value.get("id"), rating=rating, comment="\n".join(comments) or None, users=named)


def _scores(given: Any, comments: list[str]) -> list[tuple[Any, Any]]:
    """(name, value): a list of scores, or, as in tables, a map from a name to one or several values."""
    if given in (None, [], {}):
        return []
    if isinstance(given, dict):
        return [
            (name, ratings.inside(mark))
            for name, marks in given.items()
            for mark in (marks if isinstance(marks, list) else [marks])
        ]
    if not isinstance(given, list):
        raise InvalidTranscriptError("scores", f"must be a list of scores, not {kind(given)}")
    found: list[tuple[Any, Any]] = []
    for index, item in enumerate(given):
        score = as_map(item, f"scores[{index}]")
        if isinstance(score.get("comment"), str) and score["comment"]:
            comments.append(score["comment"])
        words = score.get("stringValue") or score.get("string_value")
        marks = [words, None if _categorical(score) and words else score.get("value")]
        found += [(score.get("name"), mark) for mark in marks]
    return found


def _categorical(score: dict[str, Any]) -> bool:
    """Whether its value is only the number of a category."""
    return "CATEGORICAL" in (score.get("dataType"), score.get("data_type"))
