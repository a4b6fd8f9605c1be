"""Conversations as loggers keep them: OpenAI's messages, LangChain's, or plain text. Shared by the readers.

Invariants: as the package's. Fields of OpenAI's messages are handed on, so that a transcript's own rules judge them; of
LangChain's messages the known fields are read and the rest is dropped.
"""

import json
from typing import Any

from ..errors import InvalidTranscriptError
from ..plain import as_map, as_text, kind, parse_json, path
from .record import LeaveOut, Reason

_ROLES = {
    "developer": "system",
    "human": "user",
    "ai": "assistant",
    "AIMessageChunk": "assistant",
    "HumanMessage": "user",
    "AIMessage": "assistant",
    "SystemMessage": "system",
    "ToolMessage": "tool",
    "FunctionMessage": "tool",
}
"""Names that others give to roles. What is not here stays as it is, and a transcript's rules judge it."""

_PLAIN = ("system", "user", "assistant", "tool")

_LISTS = ("messages", "input", "prompt", "question", "query")
"""Fields of a request that may hold its conversation, the likeliest first."""

_ANSWERS = ("message", "messages", "output", "answer", "response", "completion", "result", "content", "text")


def role(name: Any) -> Any:
    return _ROLES.get(name, name) if isinstance(name, str) else name


def message(given: Any, where: str) -> dict[str, Any]:
    """One message as OpenAI's clients log it, whoever logged it."""
    value = as_map(given, where)
    if value.get("lc") is not None and isinstance(value.get("kwargs"), dict):
        named = value.get("id")
        kind_of = named[-1] if isinstance(named, list) and named else value["kwargs"].get("type")
        return _langchain(value["kwargs"], kind_of, path(where, "kwargs"))
    if isinstance(value.get("data"), dict) and "role" not in value:
        return _langchain(value["data"], value.get("type"), path(where, "data"))
    if "role" not in value and isinstance(value.get("type"), str):
        return _langchain(value, value["type"], where)
    return value | {"role": role(value.get("role"))}


def messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise InvalidTranscriptError(where, f"must be a list of messages, not {kind(value)}")
    if len(value) == 1 and isinstance(value[0], list):  # LangChain's batch of one
        return messages(value[0], f"{where}[0]")
    return [message(item, f"{where}[{index}]") for index, item in enumerate(value)]


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a request. A plain string is what the user said."""
    value = unpacked(value)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, dict):
        if "role" in value or value.get("lc") is not None:
            return [message(value, where)]
        for name in _LISTS:
            if isinstance(value.get(name), str | list) and value[name]:
                return _before(value, where) + conversation(value[name], path(where, name))
        raise InvalidTranscriptError(where, f"holds no messages; known fields: {', '.join(_LISTS)}")
    return messages(value, where)


def _before(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns before a request's question, where they are in a field of their own."""
    history = value.get("chat_history")
    return (
        messages(history, path(where, "chat_history")) if isinstance(history, list) and "messages" not in value else []
    )


def answer(value: Any, where: str, depth: int = 0) -> list[dict[str, Any]]:
    """The messages of a response. Of several choices the first is read. A plain string is what the assistant said.

    Raises LeaveOut for an answer that was cut off.
    """
    value = unpacked(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, list):
        found = messages(value, where)
        _whole(value[-1] if value else None)
        return found
    value = as_map(value, where)
    _whole(value)
    if depth > 4:
        raise InvalidTranscriptError(where, "holds no answer: it is nested too deeply")
    if isinstance(value.get("choices"), list):
        return _choice(value["choices"], path(where, "choices"))
    if isinstance(value.get("generations"), list):
        return _generation(value["generations"], path(where, "generations"))
    if "role" in value or value.get("lc") is not None or role(value.get("type")) != value.get("type"):
        return [_answering(value, where)]
    for name in _ANSWERS:
        if isinstance(value.get(name), str | list | dict) and value[name]:
            return answer(value[name], path(where, name), depth + 1)
    raise InvalidTranscriptError(where, f"holds no answer; known fields: choices, generations, {', '.join(_ANSWERS)}")


def answered(asked: list[dict[str, Any]], said: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Fields of a transcript: the conversation, and the answer, of which alone is learnt.

    said: the answer's messages; where it repeats the conversation, as states of LangGraph do, what comes after it.
    """
    if len(said) > len(asked) and asked and list(map(_gist, said[: len(asked)])) == list(map(_gist, asked)):
        said = said[len(asked) :]
    turns = [len(asked) + i for i, item in enumerate(said) if item.get("role") == "assistant"]
    if not turns:
        raise InvalidTranscriptError(where, "holds no message by the assistant")
    last = turns == [len(asked) + len(said) - 1]
    return {"messages": [*asked, *said], "train_on": "last" if last else turns}


def tools_of(*places: Any) -> dict[str, Any]:
    """{"tools": ...} of the first place that has any; a place is a map that may hold tools, or a string of JSON."""
    for place in places:
        given = place.get("tools") if isinstance(place, dict) else None
        found = parsed(given)
        if isinstance(found, str) and found.strip() not in ("", "null", "None"):
            raise InvalidTranscriptError(
                "tools", "is a string that is not JSON: send a list of tools, or remove the field"
            )
        if isinstance(found, list) and found:
            return {"tools": found}
    return {}


def unpacked(value: Any) -> Any:
    """What a string of JSON holds, where exports keep a request or a response as a string; any other value as it is.

    A text that only happens to be JSON, such as an answer in JSON, stays a text.
    """
    inner = parsed(value)
    if isinstance(inner, dict):
        found = _is_message(inner) or any(isinstance(inner.get(name), list) for name in ("messages", "choices"))
        return inner if found else value
    return inner if isinstance(inner, list) and inner and all(map(_is_message, inner)) else value


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "content" in item and ("role" in item or item.get("type") in (*_ROLES, *_PLAIN))


def parsed(value: Any) -> Any:
    """The value of a string of JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _gist(item: dict[str, Any]) -> str:
    return json.dumps([item.get("role"), item.get("content")], sort_keys=True)


def _choice(choices: list[Any], where: str) -> list[dict[str, Any]]:
    if not choices:
        raise InvalidTranscriptError(where, "is empty: there is no answer")
    first = as_map(choices[0], f"{where}[0]")
    _whole(first)
    if first.get("message") is None and isinstance(first.get("text"), str):
        return [{"role": "assistant", "content": first["text"]}]
    return [_answering(first.get("message"), f"{where}[0].message")]


def _generation(generations: list[Any], where: str) -> list[dict[str, Any]]:
    """LangChain's: a list of lists of candidates."""
    inner = generations[0] if generations and isinstance(generations[0], list) else generations
    if not inner:
        raise InvalidTranscriptError(where, "is empty: there is no answer")
    first = as_map(inner[0], f"{where}[0]")
    _whole(first)
    if isinstance(first.get("message"), dict):
        return [_answering(first["message"], f"{where}[0].message")]
    return [{"role": "assistant", "content": as_text(first.get("text"), f"{where}[0].text")}]


def _answering(value: Any, where: str) -> dict[str, Any]:
    """A message that is an answer; one without a role is the assistant's."""
    value = as_map(value, where)
    _whole(value)
    bare = "role" not in value and value.get("lc") is None and "type" not in value and "data" not in value
    return message({"role": "assistant"} | value if bare else value, where)


_REASONS = ("finish_reason", "stop_reason", "finishReason", "stopReason", "done_reason")
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "model_length")
_INSIDE = ("kwargs", "data", "response_metadata", "generation_info", "additional_kwargs")


def _whole(answer: Any) -> None:
    """Raises LeaveOut for an answer that was cut off, wherever its logger says so."""
    places = [answer]
    for place in places:  # grows: kwargs hold response_metadata
        if isinstance(place, list) and len(place) == 1:
            place = place[0]
        if not isinstance(place, dict) or len(places) > 20:
            continue
        said = [place[name] for name in _REASONS if isinstance(place.get(name), str)]
        if any(reason.lower() in _CUT_OFF for reason in said):
            raise LeaveOut(Reason.CUT_OFF)
        places += [place[name] for name in _INSIDE if name in place]


def _langchain(fields: dict[str, Any], kind_of: Any, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"role": role(fields.get("role") or kind_of), "content": fields.get("content")}
    more = fields.get("additional_kwargs")
    extra = more if isinstance(more, dict) else {}
    for name in ("name", "tool_call_id"):
        if isinstance(fields.get(name), str):
            found[name] = fields[name]
    if found["role"] == "assistant":
        calls = fields.get("tool_calls") or extra.get("tool_calls")
        if calls:
            found["tool_calls"] = _calls(calls, path(where, "tool_calls"))
        elif extra.get("function_call"):
            found["function_call"] = extra["function_call"]
        if extra.get("reasoning_content"):
            found["reasoning_content"] = extra["reasoning_content"]
    return found


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls of LangChain's own form (name, args) in OpenAI's."""
    if not isinstance(calls, list):
        raise InvalidTranscriptError(where, f"must be a list, not {kind(calls)}")
    found: list[Any] = []
    for index, call in enumerate(calls):
        call = as_map(call, f"{where}[{index}]")
        if "function" in call or "args" not in call:
            found.append(call)
        else:
            function = {"name": call.get("name"), "arguments": call["args"]}
            found.append({"id": call.get("id"), "type": "function", "function": function})
    return found
