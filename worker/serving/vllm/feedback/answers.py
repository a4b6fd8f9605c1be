"""What a server answered, read from the bytes that the client got: one message by the assistant for each choice.

Must not know: vLLM, Redis.
Invariants: bytes are read, never changed; what is not understood yields no answer, and nothing raises; a stream that
ends early yields what had come.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from worker.serving.vllm.feedback.requests import Api

_SPAN = re.compile(rb"^: weight-version (\d+)(?:-(\d+))?\s*$", re.MULTILINE)


@dataclass
class Choice:
    """One answer while it is read: text, reasoning, and tool calls by their place."""

    text: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def message(self) -> dict[str, Any] | None:
        """The answer as a message; None where nothing was said."""
        if not (self.text or self.reasoning or self.calls):
            return None
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [self.calls[place] for place in sorted(self.calls)]
        return message

    def add(self, delta: dict[str, Any]) -> None:
        """A whole message, or a part of one."""
        self.text += _string(delta.get("content"))
        self.reasoning += _string(delta.get("reasoning")) or _string(delta.get("reasoning_content"))
        for place, call in enumerate(_items(delta.get("tool_calls"))):
            index = call.get("index")
            self._call(index if isinstance(index, int) else place, call)

    def _call(self, place: int, call: dict[str, Any]) -> None:
        known = self.calls.setdefault(place, {"type": "function", "function": {"name": "", "arguments": ""}})
        if call.get("id"):
            known["id"] = _string(call["id"])
        function = call.get("function")
        if isinstance(function, dict):
            for name in ("name", "arguments"):
                known["function"][name] += _string(function.get(name))


def span(header: str, body: bytes, newest: int | None) -> tuple[int, int]:
    """(first, last) version of an answer: of X-Weight-Version, and of the comment that a stream ends with.

    newest: the live version, where a stream was cut short and has no such comment.
    """
    found = _SPAN.findall(body)
    first, last = found[-1] if found else header.encode().partition(b"-")[::2]
    start = int(first or 0)
    end = int(last or first or 0)
    return start, max(end, newest if newest is not None and not found else 0)


def read(api: Api, body: bytes, streamed: bool) -> tuple[str, list[dict[str, Any] | None]]:
    """(the completion's id as the client saw it, the answers by choice); no answers where there is none to be read."""
    try:
        events = _events(body) if streamed else [json.loads(body)]
    except (ValueError, RecursionError):
        return "", []
    events = [event for event in events if isinstance(event, dict)]
    if any(event.get("error") for event in events):
        return "", []
    if api == "responses":
        return _responses(events, streamed)
    choices: dict[int, Choice] = {}
    name = ""
    for event in events:
        name = name or _string(event.get("id"))
        for found in _items(event.get("choices")):
            index = found.get("index")
            choice = choices.setdefault(index if isinstance(index, int) else 0, Choice())
            part = found.get("delta" if streamed else "message") if api == "chat" else {"content": found.get("text")}
            choice.add(part if isinstance(part, dict) else {})
    count = max(choices, default=-1) + 1
    return name, [choices[index].message() if index in choices else None for index in range(count)]


def _events(body: bytes) -> list[Any]:
    """The JSON of an SSE body's events; the last may be cut off."""
    found = []
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                found.append(json.loads(line[6:]))
            except ValueError:
                continue
    return found


def _responses(events: list[dict[str, Any]], streamed: bool) -> tuple[str, list[dict[str, Any] | None]]:
    """The Responses API: the whole response, which a stream ends with, or the parts of text that had come."""
    choice = Choice()
    if not streamed:
        (whole,) = events or [{}]
    else:
        ends = [event["response"] for event in events if isinstance(event.get("response"), dict)]
        whole = ends[-1] if ends else {}
    if whole.get("status") in ("failed", "cancelled"):
        return "", []
    for item in _items(whole.get("output")):
        _add_item(choice, item)
    if streamed and not _items(whole.get("output")):
        for event in events:
            if event.get("type") == "response.output_text.delta":
                choice.text += _string(event.get("delta"))
            elif event.get("type") == "response.reasoning_text.delta":
                choice.reasoning += _string(event.get("delta"))
    return _string(whole.get("id")), [choice.message()]


def _add_item(choice: Choice, item: dict[str, Any]) -> None:
    parts = "".join(_string(part.get("text")) for part in _items(item.get("content")))
    if item.get("type") == "message":
        choice.text += parts
    elif item.get("type") == "reasoning":
        choice.reasoning += parts
    elif item.get("type") == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        choice.add({"tool_calls": [{"index": len(choice.calls), "id": item.get("call_id"), "function": function}]})


def _items(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""
