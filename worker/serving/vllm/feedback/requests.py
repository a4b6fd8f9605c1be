"""What a request for a completion asks for, as a conversation: chat, text and responses alike.

Must not know: vLLM, Redis.
Invariants: a request that is not understood, or whose answer is no message of its own, is none that is kept (None);
nothing raises for what a client sent.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from producer.plain import parse_json

Api = Literal["chat", "text", "responses"]

PATHS: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text",
    "/v1/responses": "responses",
}
MOST_CHOICES = 16
"""Answers of one request, at most, that are kept."""
MAX_BODY = 8 * 1024 * 1024
"""Bytes of a request that is kept; a transcript may have half of that."""

_UNLIKE_TRAINING = (
    *("chat_template", "documents", "continue_final_message", "echo", "suffix", "use_beam_search"),
    *("prompt_embeds", "background", "previous_response_id", "previous_input_messages"),
)
"""With any of these, what the model read or wrote is not what a chat template makes of the messages."""


@dataclass(frozen=True)
class Asked:
    """A request that is kept. choices: how many answers it gets. kwargs: of the chat template."""

    api: Api
    messages: list[Any]
    choices: int = 1
    model: str = ""
    user: str | None = None
    tools: list[Any] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


def read(api: Api, body: bytes) -> Asked | None:
    """The request in `body`; None where it asks not to be kept ("store": false; 0, "false" and all else that is not
    true count as that), or cannot be."""
    if len(body) > MAX_BODY:
        return None
    try:
        asked = parse_json(body.decode())
    except ValueError:
        return None
    if not isinstance(asked, dict) or not (asked.get("store") is None or asked["store"] is True):
        return None
    if any(asked.get(name) not in (None, False, "", []) for name in _UNLIKE_TRAINING):
        return None
    if asked.get("add_generation_prompt") is False:
        return None
    choices = asked.get("n") or 1
    messages = _READ[api](asked)
    if not messages or type(choices) is not int or not 1 <= choices <= MOST_CHOICES:
        return None
    model, user, tools = asked.get("model"), asked.get("user"), asked.get("tools")
    return Asked(
        api,
        messages,
        choices,
        model if isinstance(model, str) else "",
        user if isinstance(user, str) and user else None,
        _tools(api, tools) if isinstance(tools, list) and tools else None,
        _template_kwargs(asked),
    )


def _template_kwargs(asked: dict[str, Any]) -> dict[str, Any]:
    """What the request hands to the chat template, as vLLM does."""
    given = asked.get("chat_template_kwargs")
    kwargs = dict(given) if isinstance(given, dict) else {}
    reasoning = asked.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else asked.get("reasoning_effort")
    return kwargs | ({"reasoning_effort": effort} if isinstance(effort, str) else {})


def _tools(api: Api, tools: list[Any]) -> list[Any]:
    """In the form of chats: the Responses API has a function's fields beside its type."""
    if api != "responses":
        return tools
    return [
        {"type": "function", "function": {name: tool[name] for name in _FUNCTION if tool.get(name) is not None}}
        if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool
        else tool
        for tool in tools
    ]


_FUNCTION = ("name", "description", "parameters", "strict")


def _chat(asked: dict[str, Any]) -> list[Any] | None:
    messages = asked.get("messages")
    return messages if isinstance(messages, list) else None


def _text(asked: dict[str, Any]) -> list[Any] | None:
    """A prompt is kept as what a user said. One of token ids, or of several texts, is not kept."""
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else None


def _responses(asked: dict[str, Any]) -> list[Any] | None:
    """Instructions and input items as messages; None where an item has no place in a chat."""
    given, instructions = asked.get("input"), asked.get("instructions")
    messages: list[Any] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}] if given else None
    if not isinstance(given, list):
        return None
    for item in given:
        if not isinstance(item, dict) or not _add(messages, item):
            return None
    return messages


def _add(messages: list[Any], item: dict[str, Any]) -> bool:
    """Put one item of the Responses API behind `messages`; False where it has no place there."""
    match item.get("type", "message"):
        case "message":
            role = "system" if item.get("role") == "developer" else item.get("role")
            content = item.get("content")
            if isinstance(content, list):
                content = [_part(part) for part in content]
            _behind(messages, role, {"role": role, "content": content})
        case "reasoning":
            parts = item.get("content") or []
            texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            thought = "".join(text for text in texts if isinstance(text, str))
            messages.append({"role": "assistant", "content": None, "reasoning": thought})
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": str(item.get("call_id") or ""), "type": "function", "function": function}
            if messages and messages[-1].get("role") == "assistant":
                messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", []), call]
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        case "function_call_output":
            output = item.get("output")
            if not isinstance(output, str):
                return False
            messages.append({"role": "tool", "content": output, "tool_call_id": str(item.get("call_id") or "")})
        case _:
            return False
    return True


def _behind(messages: list[Any], role: Any, message: dict[str, Any]) -> None:
    """An assistant's text belongs to the reasoning before it."""
    last = messages[-1] if messages else {}
    if role == "assistant" and "reasoning" in last and last["content"] is None and "tool_calls" not in last:
        last["content"] = message["content"]
    else:
        messages.append(message)


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part


_READ = {"chat": _chat, "text": _text, "responses": _responses}
