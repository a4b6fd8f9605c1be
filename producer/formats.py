"""Formats of others that hold conversations: known by their fields, so that a refusal can say what a file is.

Nothing here converts anything.
"""

import json
from collections.abc import Callable
from typing import Any

from .errors import InvalidTranscriptError

_MESSAGES = 'write each conversation as {"messages": [{"role": ..., "content": ...}, ...]}, one a line'
_PAIRS = "give the conversation up to the answer as messages, and the two answers as chosen and rejected"
_RATINGS = "give the rating as `rating`, from -1 (disliked) to 1 (liked), beside messages"


class ForeignFormatError(InvalidTranscriptError):
    """Not a transcript but a known format of others; `problem` names it and says what to do."""


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda value: all(value.get(name) is not None for name in names)


def _any_of(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda value: value.get("messages") is not None and any(value.get(name) is not None for name in names)


def _has_map(name: str, inner: str) -> Callable[[dict[str, Any]], bool]:
    return lambda value: isinstance(value.get(name), dict) and inner in value[name]


def _lists(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda value: all(isinstance(value.get(name), list) for name in names)


FORMATS: list[tuple[Callable[[dict[str, Any]], bool], str, str]] = [
    (
        _has("preferred_output", "non_preferred_output"),
        "preference pairs of OpenAI's (preferred_output)",
        _PAIRS,
    ),
    (_has("chosen", "rejected"), "preference pairs (chosen, rejected)", _PAIRS),
    (_has("prompt", "completion", "label"), "rated completions (prompt, completion, label)", _RATINGS),
    (_has("prompt", "completion"), "prompts with completions (prompt, completion)", _MESSAGES),
    (_has_map("data", "rating"), "feedback exports of Open WebUI (type, data, snapshot)", _RATINGS),
    (_has_map("chat", "history"), "chat exports of Open WebUI (chat, history)", _MESSAGES),
    (_has("conversations"), "conversations in ShareGPT's format (conversations, from, value)", _MESSAGES),
    (_has("instruction", "output"), "instructions in Alpaca's format (instruction, input, output)", _MESSAGES),
    (_has("call_type", "response"), "request logs of LiteLLM (call_type, messages, response)", _MESSAGES),
    (_has("conversationId", "messages"), "conversation exports of LibreChat (conversationId, messages)", _MESSAGES),
    (_has("mapping"), "conversation exports of ChatGPT (mapping)", _MESSAGES),
    (_has("custom_id"), "requests of OpenAI's batch files (custom_id)", _MESSAGES),
    (_has("inputs", "outputs"), "runs of LangSmith (inputs, outputs)", _MESSAGES),
    (_lists("input", "output"), "logs of OpenAI's Responses API (input, output)", _MESSAGES),
    (_has("input", "output"), "observations of Langfuse (input, output)", _MESSAGES),
    (
        _any_of("label", "score", "feedback", "thumbs"),
        "rated conversations (messages with a label or score)",
        _RATINGS,
    ),
]
"""(is it this, what it is, what to do), the more special first."""


def recognise(value: dict[str, Any]) -> ForeignFormatError | None:
    """The refusal of `value` when it is of a known format of others."""
    for matches, name, advice in FORMATS:
        if matches(value):
            return ForeignFormatError("transcript", f"these are {name}: {advice}")
    return None


def recognise_file(start: bytes) -> str | None:
    """What a file is, by its first bytes, when that can be no JSONL: an array, or an object over several lines."""
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    array = text.startswith("[")
    if not array and text.partition("\n")[0].strip() != "{":
        return None
    try:
        first, _ = json.JSONDecoder().raw_decode(text[1:].lstrip() if array else text)
    except (ValueError, RecursionError):  # longer than what was read
        first = None
    foreign = recognise(first) if isinstance(first, dict) else None
    shape = "a JSON array" if array else "a JSON object over several lines"
    if foreign is not None:
        return f"{shape}: {foreign.problem}"
    tool = "jq -c '.[]'" if array else "jq -c ."
    return f"{shape}, where one JSON object a line is needed: convert the file ({tool} FILE > FILE.jsonl)"
