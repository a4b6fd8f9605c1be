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
    found = [mark for mark in (rating, ratings.beside(value | {"feedback": None})) if mark is not None]
    return Record(fields=fields, id=value.get("id"), rating=min(found, default=None), comment=comment)


def _said(value: dict[str, Any]) -> tuple[float | None, str | None]:
    """(rating, comment) in a run's feedback, given one by one or as statistics. A correction says: this was wrong."""
    stats, given = value.get("feedback_stats"), value.get("feedback")
    scores = [(name, _worst(item)) for name, item in stats.items()] if isinstance(stats, dict) else []
    if given is not None and not isinstance(given, list | dict):
        scores.append(("feedback", given))
        given = None
    comments: list[str] = []
    corrected = False
    for index, item in enumerate(given if isinstance(given, list) else [given] if given else []):
        item = as_map(item, f"feedback[{index}]")
        corrected |= bool(item.get("correction"))
        if isinstance(item.get("comment"), str) and item["comment"]:
            comments.append(item["comment"])
        scores.append(
            (item.get("key", "feedback"), item["score"] if item.get("score") is not None else item.get("value"))
        )
    rating = -1.0 if corrected else ratings.of_scores(scores, "feedback")
    return rating, "\n".join(comments) or None


def _worst(stats: Any) -> Any:
    """The lowest score in a feedback's statistics; 0 where only a mean is known and somebody may have disliked it."""
    stats = as_map(stats, "feedback_stats")
    mean = stats.get("avg")
    if stats.get("min") is not None or mean is None:
        return stats.get("min")
    return mean if stats.get("n") == 1 or mean == 1 or not isinstance(mean, int | float) else min(mean, 0)
