"""The formats by name, and how a record is recognised.

Invariant: a format but `messages` is known by fields that no transcript has; of two that fit, the more special one
stands first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidTranscriptError
from ..plain import shown
from . import alpaca, langfuse, langsmith, litellm, openai, openwebui, ratings, sharegpt, trl
from .record import Record

Value = dict[str, Any]

WRITE = 'write each conversation as {"messages": [{"role": ..., "content": ...}, ...]}, one a line'


@dataclass(frozen=True, slots=True)
class Format:
    """One format. read: None where it is only known by name. unique: its ids are unique, whichever file they are in."""

    name: str
    title: str
    matches: Callable[[Value], bool]
    _read: Callable[[Value], Record] | None = None
    unique: bool = False

    @property
    def short(self) -> str:
        """The title without the fields."""
        return self.title.partition(" (")[0]

    @property
    def readable(self) -> bool:
        return self._read is not None

    def read(self, value: Value) -> Record:
        """Raises InvalidTranscriptError, LeaveOut."""
        assert self._read is not None, self.name
        try:
            return self._read(value)
        except RecursionError:
            raise InvalidTranscriptError("record", "is nested too deeply; flatten it") from None


def _has(*names: str) -> Callable[[Value], bool]:
    return lambda value: all(value.get(name) is not None for name in names)


def _kept(*names: str) -> Callable[[Value], bool]:
    return lambda value: all(name in value for name in names)


def _map_with(name: str, inner: str) -> Callable[[Value], bool]:
    return lambda value: isinstance(value.get(name), dict) and inner in value[name]


def _open_webui(value: Value) -> bool:
    data = value.get("data")
    return isinstance(data, dict) and ("rating" in data or isinstance(value.get("snapshot"), dict))


def _pairs(value: Value) -> bool:
    return _has("chosen", "rejected")(value) and value.get("messages") is None  # with messages it is a transcript


def _litellm(value: Value) -> bool:
    return "messages" in value and (value.get("response") is not None or _kept("call_type", "response")(value))


def _responses(value: Value) -> bool:
    """Items of OpenAI's Responses API, which have types where messages have only roles."""
    lists = [value.get(name) for name in ("input", "output")]
    return all(isinstance(items, list) for items in lists) and any(
        isinstance(item, dict) and item.get("type") in ("message", "reasoning", "function_call", "input_text")
        for items in lists
        for item in items or ()
    )


FORMATS: list[Format] = [
    Format(
        "openai-preference",
        "preference pairs of OpenAI's (input, preferred_output, non_preferred_output)",
        _has("preferred_output", "non_preferred_output"),
        openai.read_pair,
    ),
    Format(
        "pairs", "preference pairs of TRL (prompt, chosen, rejected)", _pairs, trl.read_pair
    ),
    Format("stepwise", "completions of TRL rated step by step (completions, labels)", _has("completions", "labels")),
    Format(
        "trl", "prompts with completions of TRL (prompt, completion, label)", _has("prompt", "completion"), trl.read
    ),
    Format("openwebui", "feedback exports of Open WebUI (data, snapshot)", _open_webui, openwebui.read, unique=True),
    Format("openwebui-chat", "chat exports of Open WebUI (chat, history)", _map_with("chat", "history")),
    Format("librechat", "conversation exports of LibreChat (conversationId)", _has("conversationId", "messages")),
    Format("chatgpt", "conversation exports of ChatGPT (mapping)", _has("mapping")),
    Format("openai-batch", "requests of OpenAI's batch files (custom_id)", _has("custom_id")),
    Format("openai-responses", "logs of OpenAI's Responses API (input, output)", _responses),
    Format(
        "litellm", "request logs of LiteLLM (call_type, messages, response)", _litellm, litellm.read, unique=True
    ),
    Format("sharegpt", "ShareGPT's conversations (conversations, from, value)", _has("conversations"), sharegpt.read),
    Format("alpaca", "Alpaca's instructions (instruction, input, output)", _has("instruction", "output"), alpaca.read),
    Format(
        "langsmith", "runs of LangSmith (inputs, outputs)", _kept("inputs", "outputs"), langsmith.read, unique=True
    ),
    Format("messages", "messages: Tandem's own, OpenAI's fine-tuning, TRL's", _has("messages"), openai.read),
    Format("langfuse", "traces of Langfuse (input, output)", _kept("input", "output"), langfuse.read, unique=True),
]  # fmt: skip
"""The more special first."""

by_name = {item.name: item for item in FORMATS}
READ = [by_name["messages"], *(item for item in FORMATS if item.readable and item.name != "messages")]
"""Those that can be read, for lists: Tandem's own first."""

_NEAR: list[tuple[Callable[[Value], bool], str]] = [
    (_kept("litellm_call_id"), "request logs of LiteLLM without messages and response"),
    (_kept("call_type"), "request logs of LiteLLM without messages and response"),
    (_kept("preferred_output"), "preference pairs of OpenAI's without non_preferred_output"),
    (_kept("chosen"), "preference pairs of TRL without rejected"),
    (_kept("rejected"), "preference pairs of TRL without chosen"),
    (_kept("prompt"), "prompts of TRL without completion"),
    (_kept("completion"), "completions of TRL without prompt"),
    (_kept("instruction"), "Alpaca's instructions without output"),
    (_kept("inputs"), "runs of LangSmith without outputs"),
    (_kept("input", "traceId"), "observations of Langfuse without output"),
    (_kept("from", "value"), "turns of ShareGPT's without the list conversations around them"),
    (_kept("role", "content"), "messages without the list messages around them"),
    (_kept("text"), "plain texts (text), which hold no question and answer"),
]
"""What an unknown record nearly is."""


def recognise(value: Any) -> Format | None:
    """The format of a record, by its fields."""
    if not isinstance(value, dict):
        return None
    return next((item for item in FORMATS if item.matches(value)), None)


def near_miss(value: Any) -> str:
    """What a record of no known format looks like. Names of fields are shown, texts never."""
    if not isinstance(value, dict):
        return f"JSON values that are no objects ({type(value).__name__})"
    for matches, says in _NEAR:
        if matches(value):
            return says
    for name, item in value.items():
        if isinstance(item, list) and item and (inside := recognise(item[0])):
            take = f" (jq '.{name}[]' FILE)" if name.isascii() and name.isidentifier() else ""
            return f"one object whose field {shown(name)} holds {inside.title}: take the list out of it{take}"
    names = ", ".join(shown(name) for name in list(value)[:8]) or "none"
    return f"JSON objects with the fields {names}" + (", ..." if len(value) > 8 else "")


class ForeignFormatError(InvalidTranscriptError):
    """Not a transcript but a known format of others; `problem` names it and says what to do."""


def foreign(value: Value) -> ForeignFormatError | None:
    """The refusal of `value` as a transcript when it is of a format of others, or rated by another name."""
    found = recognise(value)
    if found is None:
        return None
    if found.name == "messages":
        rated = [name for name in ratings.fields({str(name): item for name, item in value.items()}) if name != "rating"]
        if not rated:
            return None
        problem = (
            f"these are rated conversations (messages with {shown(rated[0])}): `tandem enqueue` reads them from a file."
            " Here give the rating as `rating`, from -1 (disliked) to 1 (liked), beside messages"
        )
    elif found.name in ("pairs", "openai-preference"):
        problem = (
            f"these are {found.title}: `tandem enqueue` reads them from a file. Here give the conversation up to the "
            "answer as messages, and the two answers as chosen and rejected"
        )
    elif found.readable:
        problem = f"these are {found.title}: `tandem enqueue` reads them from a file. Here {WRITE}"
    else:
        problem = f"these are {found.title}: {WRITE}"
    return ForeignFormatError("transcript", problem)
