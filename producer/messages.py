"""Messages as clients log them, turned into the one form that chat templates read.

Accepts the OpenAI chat shape as OpenAI's and vLLM's clients dump it (checked on openai 3.54 and on vLLM 0.26):
fields that are null or empty are dropped, any other unknown field is an error by name.
Must not know: training, ids, Redis. Invariants: normalising is idempotent, and raises `InvalidTranscript` only.
"""

from typing import Any

from .plain import InvalidTranscript, PlainCopy, as_map, as_name, as_text, kind, known, listed, parse_json

ROLES = ("system", "user", "assistant", "tool")

MAX_MESSAGES = 4096

_MESSAGE_FIELDS = {
    "system": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "reasoning", "reasoning_content", "tool_calls"),
    "tool": ("content", "name", "tool_call_id"),
}


def normalise(messages: Any, copy: PlainCopy) -> list[dict[str, Any]]:
    """Plain messages in their one form; `copy` is the budget that strings of JSON are unpacked within."""
    if not isinstance(messages, list):
        raise InvalidTranscript("messages", f"must be a list of messages, not {kind(messages)}")
    if not messages:
        raise InvalidTranscript("messages", "is empty; give at least one assistant turn to learn from")
    if len(messages) > MAX_MESSAGES:
        raise InvalidTranscript("messages", f"has {len(messages)} messages, the limit is {MAX_MESSAGES}; split it")
    return [_message(message, f"messages[{index}]", copy) for index, message in enumerate(messages)]


def _message(raw: Any, where: str, copy: PlainCopy) -> dict[str, Any]:
    raw = as_map(raw, where)
    role = raw.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        hint = "; call it system" if role == "developer" else ""
        raise InvalidTranscript(f"{where}.role", f"must be one of {listed(ROLES)}{hint}")
    # `parsed` is OpenAI's client's own reading of content; refusal, annotations, audio, function_call come as nulls.
    fields = known(raw, _MESSAGE_FIELDS[role], where, derived=("parsed",), whose=f" of a message by {role}")
    message: dict[str, Any] = {"role": role, "content": _content(fields.pop("content", None), f"{where}.content", role)}
    reasoning = _reasoning(fields, where)
    if reasoning:
        message["reasoning_content"] = reasoning
    for name in ("name", "tool_call_id"):
        if name in fields:
            message[name] = as_text(fields[name], f"{where}.{name}")
    if "tool_calls" in fields:
        message["tool_calls"] = _tool_calls(fields["tool_calls"], f"{where}.tool_calls", copy)
    return message


def _content(content: Any, where: str, role: str) -> str:
    if content is None:
        if role != "assistant":
            raise InvalidTranscript(where, f"is missing; a message by {role} needs a string or text parts")
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidTranscript(where, f"must be a string or a list of text parts, not {kind(content)}")
    texts = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        part = as_map(part, here)
        if part.get("type") != "text":
            raise InvalidTranscript(f"{here}.type", 'must be "text"; images and other parts are not trained on')
        fields = known(part, ("type", "text"), here)
        texts.append(as_text(fields.get("text"), f"{here}.text"))
    return "".join(texts)  # as the Qwen templates print parts: one after the other


def _reasoning(fields: dict[str, Any], where: str) -> str:
    """vLLM logs `reasoning` (older versions `reasoning_content`, some both); templates read `reasoning_content`."""
    texts = [as_text(fields[n], f"{where}.{n}") for n in ("reasoning", "reasoning_content") if fields.get(n)]
    if len(texts) == 2 and texts[0] != texts[1]:
        raise InvalidTranscript(f"{where}.reasoning", "differs from reasoning_content; send one of them")
    return texts[0] if texts else ""


def _tool_calls(calls: Any, where: str, copy: PlainCopy) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidTranscript(where, f"must be a list, not {kind(calls)}")
    return [_tool_call(call, f"{where}[{index}]", copy) for index, call in enumerate(calls)]


def _tool_call(raw: Any, where: str, copy: PlainCopy) -> dict[str, Any]:
    call = known(as_map(raw, where), ("id", "type", "function"), where, derived=("index",))
    if call.get("type", "function") != "function":
        raise InvalidTranscript(f"{where}.type", 'must be "function"')
    here = f"{where}.function"
    if "function" not in call:
        raise InvalidTranscript(here, "is missing; give its name and arguments")
    function = known(as_map(call["function"], here), ("name", "arguments"), here, derived=("parsed_arguments",))
    plain: dict[str, Any] = {"id": as_text(call["id"], f"{where}.id")} if "id" in call else {}
    plain["type"] = "function"
    plain["function"] = {
        "name": as_name(function.get("name"), f"{here}.name"),
        "arguments": _arguments(function.get("arguments"), f"{here}.arguments", copy),
    }
    return plain


def _arguments(arguments: Any, where: str, copy: PlainCopy) -> dict[str, Any]:
    """Templates want an object; OpenAI's form is a string of JSON. None, "" and "null" mean {}, as in vLLM."""
    if isinstance(arguments, str) and arguments:
        try:
            arguments = copy(parse_json(arguments), where)
        except InvalidTranscript:
            raise
        except ValueError as error:
            raise InvalidTranscript(where, f"{error}; give an object, or one as a string of JSON") from None
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, dict):
        raise InvalidTranscript(where, f"must be an object or a string of JSON that is one, not {kind(arguments)}")
    return arguments


def says_something(message: dict[str, Any]) -> bool:
    """Whether a normalised message holds anything that a model could have generated."""
    return bool(message["content"].strip() or message.get("reasoning_content", "").strip() or message.get("tool_calls"))
