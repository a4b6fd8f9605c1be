"""ShareGPT's conversations, [{"from": ..., "value": ...}], and their kin that write role and content instead.

Read: `system` and `tools` beside them, as LLaMA-Factory writes both; a weight of a turn.
"""

from typing import Any

from .. import users
from ..errors import InvalidTranscriptError
from ..plain import as_map, as_text, kind, parse_json
from . import chat, ratings
from .record import Record

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
_CALL = ("function_call", "tool_call")


def read(value: dict[str, Any]) -> Record:
    fields: dict[str, Any] = {"messages": turns(value, "conversations")} | tools(value)
    return Record(fields=fields, id=value.get("id"), rating=ratings.beside(value), users=users.beside(value))


def turns(value: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The turns in `field`, after the system prompt beside them."""
    given = value.get(field)
    if not isinstance(given, list):
        raise InvalidTranscriptError(field, f"must be a list of turns, not {kind(given)}")
    found = [turn(item, f"{field}[{index}]") for index, item in enumerate(given)]
    return system(value) + found


def system(value: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = value.get("system")
    return [{"role": "system", "content": as_text(prompt, "system")}] if prompt else []


def tools(value: dict[str, Any]) -> dict[str, Any]:
    """Tools, a list or one as a string of JSON; functions without their wrapping get it."""
    found = chat.tools_of(value)
    if found:
        found["tools"] = [
            {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
            for tool in found["tools"]
        ]
    return found


def turn(item: Any, where: str) -> dict[str, Any]:
    item = as_map(item, where)
    if "from" not in item and "role" in item:
        return chat.message(item, where)
    said = item.get("from")
    text = as_text(item.get("value"), f"{where}.value")
    rest = {name: more for name, more in item.items() if name not in ("from", "value")}
    if said in _CALL:
        return rest | {"role": "assistant", "content": "", "tool_calls": _calls(text, f"{where}.value")}
    if not isinstance(said, str) or said not in _ROLES:
        raise InvalidTranscriptError(f"{where}.from", f"must be one of {', '.join([*_ROLES, *_CALL])}")
    return rest | {"role": _ROLES[said], "content": text}


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    """{"name", "arguments"}, or a list of such, as a string of JSON."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InvalidTranscriptError(where, f"{error}; a call is JSON with a name and arguments") from None
    return [
        {"type": "function", "function": as_map(call, where)}
        for call in (found if isinstance(found, list) else [found])
    ]
