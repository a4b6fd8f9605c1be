"""Open WebUI's feedback: a rated answer, and the chat around it as it was.

Read: the messages that lead to the rated one, the chat's system prompt, the rating and the comment, who gave them and
whose chat it is. Dropped: the details of the rating, tags, models, sources that were searched. Answers to files are
refused: the files are not there.
"""

from typing import Any

from .. import users
from ..errors import InvalidTranscriptError
from ..plain import as_map, as_name, as_text
from . import ratings
from .record import LeaveOut, Reason, Record


def read(value: dict[str, Any]) -> Record:
    data = as_map(value.get("data"), "data")
    said, given = data.get("comment"), data.get("rating")
    comment = said if isinstance(said, str) and said.strip() else None
    if given in (None, "") and comment is None:
        raise LeaveOut(Reason.UNRATED)
    chat, meta = _chat(value), as_map(value.get("meta"), "meta")
    turns = _path(chat, as_name(meta.get("message_id"), "meta.message_id"))
    return Record(
        fields={"messages": [*_system(chat), *turns], "train_on": "last"},
        id=value.get("id"),
        rating=None if given in (None, "") else ratings.opinion(given, "data.rating"),
        comment=comment,
        users=users.beside(value, value["snapshot"]),
    )


def _chat(value: dict[str, Any]) -> dict[str, Any]:
    """The map with the history; the snapshot is a row of the table of chats, whose field chat holds it."""
    if value.get("snapshot") is None:
        raise InvalidTranscriptError("snapshot", "is missing: export the feedback with its chats (Admin, Evaluations)")
    found = as_map(as_map(value["snapshot"], "snapshot").get("chat"), "snapshot.chat")
    return found["chat"] if isinstance(found.get("chat"), dict) else found


def _system(chat: dict[str, Any]) -> list[dict[str, Any]]:
    params = chat.get("params")
    prompt = (params.get("system") if isinstance(params, dict) else None) or chat.get("system")
    return [{"role": "system", "content": as_text(prompt, "snapshot.chat.params.system")}] if prompt else []


def _path(chat: dict[str, Any], rated: str) -> list[dict[str, Any]]:
    """The messages from the first one to the rated one: an answer that was asked for again has others beside it."""
    where = "snapshot.chat.history.messages"
    history = chat.get("history")
    by_id = as_map(history.get("messages") if isinstance(history, dict) else None, where)
    found: list[dict[str, Any]] = []
    at: Any = rated
    while at is not None:
        if not isinstance(at, str) or at not in by_id:
            raise InvalidTranscriptError(where, "does not hold the rated message with all that leads to it")
        if len(found) > len(by_id):
            raise InvalidTranscriptError(where, "has parents that lead in a circle")
        item = as_map(by_id[at], f"{where}[{len(found)}]")
        found.append(_message(item, f"message {len(found)} before the rated one" if found else "the rated message"))
        at = item.get("parentId")
    if by_id[rated].get("role") != "assistant":
        raise InvalidTranscriptError("meta.message_id", "names no message by the assistant")
    if by_id[rated].get("error"):
        raise LeaveOut(Reason.FAILED)
    if by_id[rated].get("done") is False:
        raise LeaveOut(Reason.CUT_OFF)
    return found[::-1]


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("files"):
        raise InvalidTranscriptError("snapshot", f"{where} has files, which are not there: leave this feedback out")
    return {"role": item.get("role"), "content": item.get("content")}
