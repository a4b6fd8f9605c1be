"""Conversations as messages: Tandem's own lines, OpenAI's fine-tuning format, TRL's `messages`; and OpenAI's pairs.

Read: the fields of a transcript, its id, rating and correction among them; a rating by another name; OpenAI's older
`functions` and the role developer.
"""

from typing import Any

from .. import users
from ..plain import as_map
from . import chat, ratings
from .record import Record, differ


def read(value: dict[str, Any]) -> Record:
    rated = ratings.fields(value)
    fields = {name: item for name, item in value.items() if name not in rated}
    if isinstance(fields.get("functions"), list) and not fields.get("tools"):
        functions = fields.pop("functions")
        fields["tools"] = [{"type": "function", "function": function} for function in functions]
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_named(item) for item in fields["messages"]]
    return Record(
        fields=fields, rating=ratings.beside({name: value[name] for name in rated}), rejected=_corrected(fields)
    )


def _corrected(fields: dict[str, Any]) -> list[Any] | None:
    """The rejected answer of a correction; the chosen one is moved to the end of the messages. What cannot be one stays
    in `fields`, for a transcript's rules to refuse."""
    chosen, messages = fields.get("chosen"), fields.get("messages")
    if not isinstance(fields.get("rejected"), str | dict | list) or not isinstance(messages, list) or not messages:
        return None
    if chosen is not None:
        last = messages[-1]
        if not isinstance(chosen, str | dict) or (isinstance(last, dict) and last.get("role") == "assistant"):
            return None
        said = {"content": chosen} if isinstance(chosen, str) else chosen
        fields["messages"] = [*messages, {"role": "assistant"} | said]
    elif not (isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"):
        return None
    differ([fields["messages"][-1]], [fields["rejected"]])
    fields.pop("chosen", None)
    return [fields.pop("rejected")]


def read_pair(value: dict[str, Any]) -> Record:
    """{"input": {"messages", "tools"}, "preferred_output": [...], "non_preferred_output": [...]}."""
    given = as_map(value.get("input"), "input")
    asked = chat.messages(given.get("messages"), "input.messages")
    said = chat.messages(value.get("preferred_output"), "preferred_output")
    worse = chat.messages(value.get("non_preferred_output"), "non_preferred_output")
    differ(said, worse)
    fields = chat.answered(asked, said, "preferred_output") | chat.tools_of(given)
    return Record(
        fields=fields, id=value.get("id"), rating=ratings.beside(value), rejected=worse, users=users.beside(value)
    )


def _named(item: Any) -> Any:
    return item | {"role": "system"} if isinstance(item, dict) and item.get("role") == "developer" else item
