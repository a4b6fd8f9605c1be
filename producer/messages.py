"""Messages as clients log them, turned into the one form that chat templates read.

Accepts the OpenAI chat shape as OpenAI's and vLLM's clients dump it (checked on openai 3.54 and on vLLM 0.26), and as
gateways and chat applications log it: fields that say nothing or only describe the request are dropped, older names are
translated, any other unknown field is an error by name. Must not know: Redis.
Invariants: normalising is idempotent, and raises `InvalidTranscriptError` only.
"""

from typing import Any

from . import reasoning
from .errors import InvalidTranscriptError
from .plain import PlainCopy, as_map, as_name, as_text, kind, known, listed, parse_json

ROLES = ("system", "user", "assistant", "tool")

MAX_MESSAGES = 4096

_MESSAGE_FIELDS = {
    "system": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "tool_calls", "function_call", *reasoning.FIELDS),
    "tool": ("content", "name", "tool_call_id"),
}

LOGGED = frozenset({
    "id", "object", "index", "created", "created_at", "updated_at", "timestamp", "model", "usage", "metrics", "done",
    "finish_reason", "native_finish_reason", "stop_reason", "logprobs", "token_ids", "system_fingerprint", "parsed",
    "annotations", "citations", "provider_specific_fields", "cache_control", "parentId", "childrenIds",
})  # fmt: skip
"""What clients log beside a message and no chat template reads: about the request, or about the text."""

_HINTS = {
    "refusal": "the model refused here: send the text as content, with weight 0 if it is not to be learnt",
    "audio": "audio is not trained: send what was said as content",
    "images": "images are not trained: leave the transcript out, or the field if the answer does not need it",
    "files": "files are not trained: leave the transcript out, or the field if the answer does not need it",
    "reasoning_effort": "belongs into chat_template_kwargs of the transcript, if the chat template reads it",
}
_OTHER_ROLES = {
    "developer": "; call it system",
    "human": "; call it user",
    "ai": "; call it assistant",
    "bot": "; call it assistant",
    "model": "; call it assistant",
}


def normalise(messages: Any, copy: PlainCopy) -> tuple[list[dict[str, Any]], set[int]]:
    """Plain messages in their one form, and the indices of those that have weight 0.

    `copy` is the budget that strings of JSON are unpacked within.
    """
    if not isinstance(messages, list):
        raise InvalidTranscriptError("messages", f"must be a list of messages, not {kind(messages)}")
    if not messages:
        raise InvalidTranscriptError("messages", "is empty; give at least one assistant turn to learn from")
    if len(messages) > MAX_MESSAGES:
        raise InvalidTranscriptError("messages", f"has {len(messages)} messages, the limit is {MAX_MESSAGES}; split it")
    normalised, left_out = [], set()
    for index, raw in enumerate(messages):
        where = f"messages[{index}]"
        message = as_map(raw, where)
        if not _counts(message.pop("weight", None), message.get("role"), f"{where}.weight"):
            left_out.add(index)
        normalised.append(_message(message, where, copy))
    return normalised, left_out


def _counts(weight: Any, role: Any, where: str) -> bool:
    """Whether a message may be trained, by its own weight: 0 or 1, as in OpenAI's fine-tuning format."""
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InvalidTranscriptError(where, "must be 0 or 1; the weight beside messages may lie between")
    if weight and role != "assistant":
        raise InvalidTranscriptError(where, "only messages by assistant are trained; remove it")
    return bool(weight)


def _message(raw: dict[str, Any], where: str, copy: PlainCopy) -> dict[str, Any]:
    role = raw.pop("role", None)
    if role == "function":  # OpenAI's older name
        role = "tool"
    if not isinstance(role, str) or role not in ROLES:
        hint = _OTHER_ROLES.get(role, "") if isinstance(role, str) else ""
        raise InvalidTranscriptError(f"{where}.role", f"must be one of {listed(ROLES)}{hint}")
    fields = known(raw, _MESSAGE_FIELDS[role], where, LOGGED, f" of a message by {role}", _HINTS)
    content = _content(fields.pop("content", None), f"{where}.content", role)
    thought = ""
    if role == "assistant":
        thought, content = reasoning.take(fields, content, where)
    message: dict[str, Any] = {"role": role, "content": content}
    # Without the field, templates look for a think block in the content, and cut an answer that mentions a tag.
    if thought or (role == "assistant" and reasoning.CLOSE in content):
        message["reasoning_content"] = thought
    for name in ("name", "tool_call_id"):
        if name in fields:
            message[name] = as_text(fields[name], f"{where}.{name}")
    if "function_call" in fields:
        if "tool_calls" in fields:
            raise InvalidTranscriptError(
                f"{where}.function_call", "comes beside tool_calls; send the call in tool_calls"
            )
        fields["tool_calls"] = [{"function": as_map(fields["function_call"], f"{where}.function_call")}]
    if "tool_calls" in fields:
        message["tool_calls"] = _tool_calls(fields["tool_calls"], f"{where}.tool_calls", copy)
    return message


def _content(content: Any, where: str, role: str) -> str:
    if content is None:
        if role != "assistant":
            raise InvalidTranscriptError(where, f"is missing; a message by {role} needs a string or text parts")
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidTranscriptError(where, f"must be a string or a list of text parts, not {kind(content)}")
    texts = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        part = as_map(part, here)
        if part.get("type") != "text":
            raise InvalidTranscriptError(f"{here}.type", _part_problem(part.get("type")))
        fields = known(part, ("type", "text"), here, LOGGED)
        texts.append(as_text(fields.get("text"), f"{here}.text"))
    return "".join(texts)  # as the Qwen templates print parts: one after the other


def _part_problem(found: Any) -> str:
    if found in ("input_text", "output_text"):
        return 'must be "text", the name of the same in chat messages'
    if found in ("thinking", "reasoning"):
        return 'must be "text"; put reasoning into the field reasoning of the message'
    return 'must be "text"; images and other parts are not trained: leave the transcript, or the message, out'


def _tool_calls(calls: Any, where: str, copy: PlainCopy) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidTranscriptError(where, f"must be a list, not {kind(calls)}")
    return [_tool_call(call, f"{where}[{index}]", copy) for index, call in enumerate(calls)]


def _tool_call(raw: Any, where: str, copy: PlainCopy) -> dict[str, Any]:
    call = known(as_map(raw, where), ("id", "type", "function"), where, LOGGED - {"id"})
    if call.get("type", "function") != "function":
        raise InvalidTranscriptError(
            f"{where}.type", 'must be "function"; others cannot be rendered: leave the transcript out'
        )
    here = f"{where}.function"
    if "function" not in call:
        raise InvalidTranscriptError(here, "is missing; give its name and arguments")
    function = known(as_map(call["function"], here), ("name", "arguments"), here, ("parsed_arguments",))
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
        except InvalidTranscriptError:
            raise
        except ValueError as error:
            raise InvalidTranscriptError(where, f"{error}; give an object, or one as a string of JSON") from None
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, dict):
        raise InvalidTranscriptError(where, f"must be an object or a string of JSON that is one, not {kind(arguments)}")
    return arguments


def says_something(message: dict[str, Any]) -> bool:
    """Whether a normalised message holds anything that a model could have generated."""
    return bool(message["content"].strip() or message.get("reasoning_content", "").strip() or message.get("tool_calls"))
