"""LangSmith's runs and examples: {"inputs": {...}, "outputs": {...}}.

Read: the conversation in inputs, the answer in outputs, OpenAI's messages or LangChain's; tools; feedback of users.
Left out: runs that failed, and runs of a trace's inside that are no call of a model.
"""

from typing import Any

from ..plain import as_map
from . import chat, ratings
from .record import LeaveOut, Reason, Record


def read(value: dict[str, Any]) -> Record:
    if value.get("error"):
        raise LeaveOut(Reason.FAILED)
    if value.get("run_type") not in (None, "llm") and (value["run_type"] != "chain" or value.get("parent_run_id")):
        raise LeaveOut(Reason.NO_CHAT)
    given, made = as_map(value.get("inputs"), "inputs"), as_map(value.get("outputs"), "outputs")
    extra = value.get("extra")
    asked_with = extra.get("invocation_params") if isinstance(extra, dict) else None
    fields = chat.answered(chat.conversation(given, "inputs"), chat.answer(made, "outputs"), "outputs")
    fields |= chat.tools_of(given, asked_with)
    rating, comment = _said(value)
    rating = ratings.together([rating, ratings.beside(value | {"feedback": None})])
    return Record(fields=fields, id=value.get("id"), rating=rating, comment=comment)


def _said(value: dict[str, Any]) -> tuple[float | None, str | None]:
    """(rating, comment) in a run's feedback, given one by one or as statistics. A correction takes a like back."""
    given, stats = value.get("feedback"), value.get("feedback_stats")
    scores: list[tuple[Any, Any]] = []
    comments: list[Any] = []
    corrected = False
    for name, item in stats.items() if isinstance(stats, dict) else ():
        item = as_map(item, "feedback_stats")
        scores += [(name, mark) for mark in _marks(item)]
        comments += item["comments"] if isinstance(item.get("comments"), list) else []
    if given is not None and not isinstance(given, list | dict):
        scores.append(("feedback", given))
        given = None
    for index, item in enumerate(given if isinstance(given, list) else [given] if given else []):
        item = as_map(item, f"feedback[{index}]")
        mark = item["score"] if item.get("score") is not None else item.get("value")
        scores.append((item.get("key", "feedback"), mark))
        comments.append(item.get("comment"))
        corrected |= bool(item.get("correction"))
    rating = 0.0 if corrected else ratings.of_scores(scores, "feedback")
    return rating, "\n".join(text for text in comments if isinstance(text, str) and text.strip()) or None


def _marks(stats: dict[str, Any]) -> list[Any]:
    """The marks in a feedback's statistics: the lowest and the highest, and the words that were chosen.

    Where only a mean of several is known, they did not all say the same unless it is the highest or the lowest mark."""
    words = list(stats["values"]) if isinstance(stats.get("values"), dict) else []
    mean = stats.get("avg")
    ends = [stats.get("min"), stats.get("max")]
    if ends == [None, None] and mean is not None:
        ends = [mean] if stats.get("n") == 1 or mean in (-1, 0, 1) else [-1, 1]
    return [mark for mark in ends if mark is not None] + words
