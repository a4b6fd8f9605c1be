"""LangSmith's runs and examples: {"inputs": {...}, "outputs": {...}}.

Read: the conversation in inputs, the answer in outputs, OpenAI's messages or LangChain's; tools; feedback, and
its users and the run's. Left out: runs that failed, and runs of a trace's inside that are no call of a model.
"""

from typing import Any

from .. import users
from ..plain import as_map
from . import chat, ratings
from .rating_names import FIELDS, plain
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
    rest = {name: item for name, item in value.items() if name not in _FEEDBACK}
    rating = ratings.together([rating, ratings.beside(rest)])
    if rating is None and any(value.get(name) not in (None, "", [], {}) for name in _FEEDBACK):
        raise LeaveOut(Reason.UNRATED)
    return Record(fields=fields, id=value.get("id"), rating=rating, comment=comment, users=_users(value))


def _users(value: dict[str, Any]) -> tuple[str, ...]:
    """Who had asked, by the run's metadata, and whose feedback it has."""
    extra, given = value.get("extra"), chat.parsed(value.get("feedback"))
    places = [value, value.get("metadata"), extra.get("metadata") if isinstance(extra, dict) else None]
    for item in given if isinstance(given, list) else [given]:
        for _, entry in _entries(item) if isinstance(item, dict) else ():
            source = entry.get("feedback_source")
            places += [source, source.get("metadata") if isinstance(source, dict) else None]
    return users.beside(*places)


_FEEDBACK = ("feedback", "feedback_stats")
_ENTRY = ("key", "score", "value", "comment", "correction")
"""Fields of a feedback, of which one or more are there."""
_MEANS = ("avg", "mean", "average")
_STATISTICS = (*_MEANS, "n", "min", "max", "values", "comments")


def _said(value: dict[str, Any]) -> tuple[float | None, str | None]:
    """(rating, comment) in a run's feedback, given one by one or as statistics. A correction takes a like back."""
    scores: list[tuple[Any, Any]] = []
    comments: list[Any] = []
    corrected = False
    for where in _FEEDBACK:
        given = chat.parsed(value.get(where))
        if given in (None, ""):
            continue
        if not isinstance(given, list | dict):
            scores.append(("feedback", given))
            continue
        for index, item in enumerate(given if isinstance(given, list) else [given] if given else []):
            item = as_map(item, f"{where}[{index}]")
            for name, entry in _entries(item):
                scores += [(name, mark) for mark in _marks(entry)]
                more = entry.get("comments")
                comments += [entry.get("comment"), *(more if isinstance(more, list) else [])]
                corrected |= bool(entry.get("correction"))
    rating = 0.0 if corrected else ratings.of_scores(scores, "feedback")
    return rating, "\n".join(text for text in comments if isinstance(text, str) and text.strip()) or None


def _entries(item: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(name, feedback or statistics): of one with its name in it, or of a map from names to them or to bare marks."""
    if "key" in item or any(name in item and not isinstance(item[name], dict) for name in _ENTRY):
        rest = {name: mark for name, mark in item.items() if name not in _ENTRY and plain(name) in FIELDS}
        return [(item.get("key", "feedback"), item), *_entries(rest)]
    return [(name, mark if isinstance(mark, dict) else {"value": mark}) for name, mark in item.items()]


def _marks(said: dict[str, Any]) -> list[Any]:
    """The marks in a feedback, or in its statistics: the lowest and the highest, and the words that were chosen.

    Where only a mean of several is known, they did not all say the same unless it is the highest or the lowest mark."""
    if not any(name in said for name in _STATISTICS):
        mark = said["score"] if said.get("score") is not None else said.get("value")
        if mark is None and not any(name in said for name in _ENTRY) and said:
            return [said]
        return mark if isinstance(mark, list) else [mark]
    words = list(said["values"]) if isinstance(said.get("values"), dict) else []
    mean = next((said[name] for name in _MEANS if said.get(name) is not None), None)
    ends = [said.get("min"), said.get("max"), said.get("score"), said.get("value")]
    if ends == [None] * 4 and mean is not None:
        ends = [mean] if said.get("n") == 1 or mean in (-1, 0, 1) else [-1, 1]
    return [mark for mark in ends if mark is not None] + words
