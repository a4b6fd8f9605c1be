"""A transcript: one conversation, what of it to train on, and how much it counts.

Must not know: Redis, RQ.
Invariants: a `Transcript` that exists is valid; `Transcript.from_dict(t.to_dict()) == t`; validation raises
`InvalidTranscript` and nothing else; texts never appear in errors or in `repr`.
"""

import math
import re
from dataclasses import InitVar, dataclass, field
from typing import Any

from . import users
from .feedback import Kind, Method, as_comment, as_method, as_rating, check_alone, check_asked, kind_of, pair
from .formats import foreign
from .messages import MAX_MESSAGES, ROLES, normalise, says_something
from .plain import MAX_DEPTH, InvalidTranscript, PlainCopy, as_map, as_name, kind, listed, path
from .reasoning import unfit

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_ID", "MAX_MESSAGES", "MAX_META_BYTES", "MAX_TOOLS", "ROLES"]
__all__ += ["InvalidTranscript", "Transcript", "check_id"]

MAX_BYTES = 4 * 1024 * 1024
"""Size of messages, tools and template arguments together: UTF-8 text plus 16 bytes a value."""

MAX_META_BYTES = 64 * 1024
MAX_TOOLS = 512
MAX_ID = 128

ID_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
"""RQ's own alphabet (rq 3.0, `JOB_ID_PATTERN`)."""

LOGGED = frozenset({
    "model", "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "n", "stop", "stream",
    "stream_options", "seed", "user", "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "object",
    "frequency_penalty", "repetition_penalty", "parallel_tool_calls", "tool_choice", "function_call", "created",
    "response_format", "service_tier", "store", "created_at", "timestamp", "usage", "system_fingerprint", "priority",
    "safety_identifier", "prompt_cache_key", "cache_salt", "request_id", "ignore_eos", "skip_special_tokens",
})  # fmt: skip
"""What clients log beside the conversation and a chat template does not read: how the answer was asked for."""

_HINTS = {
    "functions": 'is the older name of tools; send [{"type": "function", "function": ...}, ...] as tools',
    "metadata": "call it meta, which travels with the transcript and is not trained",
    "user_id": "call it user: whose transcript it is, which tandem forget looks for",
    "system": "belongs into messages, as the first of them, with the role system",
    **dict.fromkeys(("enable_thinking", "reasoning_effort"), "belongs into chat_template_kwargs"),
}

RESERVED_TEMPLATE_KWARGS = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
]
"""Arguments of the rendering itself. `chat_template` among them would let a transcript bring its own program."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Transcript:
    """A validated transcript; constructing one validates and normalises it, or raises `InvalidTranscript`.

    id: RQ's alphabet, at most MAX_ID characters; None: the producer makes one up.
    messages: OpenAI chat messages. Normalised: `content` is always a string, `reasoning` is called `reasoning_content`,
        a tool call's `arguments` are an object, fields that say nothing are gone.
    train_on: "all" assistant turns, the "last" one, or a list of indices into `messages`. What was said of an answer
        (`rating`, `rejected`, `comment`) is about the last one, unless a list names others.
    weight: finite, in (0, 1]: the factor on this transcript's loss.
    rating: from -1 to 1 and not 0, true or false: how much the answer was liked. Below 0 it is unlearnt.
    chosen, rejected: the answer to give, and the one that it is to be preferred to; each is a text or a message.
        `chosen` becomes the last of `messages`.
    comment: what the user said of the last answer, such as "be shorter": the answer is learnt that the model gives
        once it has been told so.
    method: "imitate" a demonstration (by likelihood), or "distill" it, from the model that has seen it.
    tools: function definitions for the chat template, or None.
    chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": false}.
    meta: the application's own data; it travels with the job and is not trained on.
    """

    id: str | None = None
    messages: list[dict[str, Any]]
    train_on: str | list[int] = "all"
    weight: float = 1.0
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    rating: float | None = None
    rejected: dict[str, Any] | None = None
    comment: str | None = None
    method: Method = "imitate"
    chosen: InitVar[Any] = None

    def __post_init__(self, chosen: Any) -> None:
        # The raw form may be wordier than the form that is kept; the kept form must fit the limit by itself,
        # or the worker, which validates again, would refuse what the producer let through.
        copy = PlainCopy(2 * MAX_BYTES)
        messages, left_out = normalise(copy(self.messages, "messages"), copy)
        messages, rejected = pair(messages, chosen, self.rejected, copy)
        rating, comment, method = (
            as_rating(self.rating),
            as_comment(copy(self.comment, "comment")),
            as_method(self.method),
        )
        check_alone(rating=rating, rejected=rejected, comment=comment, method=method)
        said = rating is not None or rejected is not None or comment is not None
        kept: dict[str, Any] = {
            "id": None if self.id is None else check_id(self.id),
            "messages": messages,
            "train_on": _train_on(_about(self.train_on, messages, rejected, said=said), messages, left_out),
            "weight": _weight(self.weight),
            "tools": _tools(copy(self.tools, "tools")),
            "chat_template_kwargs": _template_kwargs(copy(self.chat_template_kwargs, "chat_template_kwargs")),
            "meta": as_map(PlainCopy(MAX_META_BYTES)(self.meta, "meta"), "meta"),
            "rating": rating,
            "rejected": rejected,
            "comment": comment,
            "method": method,
        }
        turns = trained_turns(messages, kept["train_on"])
        if comment is not None or method == "distill":
            check_asked(messages, turns, "method" if comment is None else "comment")
        for index in turns:
            if problem := unfit(messages[index]["content"]):
                raise InvalidTranscript(f"messages[{index}].content", problem)
        final = PlainCopy(MAX_BYTES)
        for name in ("tools", "chat_template_kwargs", "messages", *(["rejected"] if rejected else [])):
            final(kept[name], name)
        for name, value in kept.items():
            object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def kind(self) -> Kind:
        """What it says of the turns it trains."""
        return kind_of(self.rating, self.rejected, self.comment, self.method)

    @classmethod
    def from_dict(cls, value: Any) -> "Transcript":
        """A transcript from its plain map, e.g. one parsed line of a JSONL file; a user that clients log beside it goes
        into meta. Raises InvalidTranscript."""
        if not isinstance(value, dict):
            raise InvalidTranscript("transcript", f"must be an object with messages, not {type(value).__name__}")
        unknown = [name for name, item in value.items() if name not in FIELDS and item not in (None, [], {}, "")]
        unknown = [name for name in unknown if name not in LOGGED]
        if unknown and (refusal := foreign(value)):
            raise refusal
        for name in unknown:
            hint = f"is no field of a transcript; put it into meta. Known: {listed(FIELDS)}"
            raise InvalidTranscript(path("", str(name)).lstrip("."), _HINTS.get(name, hint))
        if value.get("messages") is None:
            missing = InvalidTranscript("messages", "is missing; give the conversation as a list of messages")
            raise foreign(value) or missing
        fields = {name: value[name] for name in FIELDS if value.get(name) is not None}
        if named := users.logged(value):
            fields["meta"] = users.into(value.get("meta"), named)
        return cls(**fields)

    def to_dict(self, *, meta: bool = True) -> dict[str, Any]:
        """The plain map, without what has its default. `meta=False`: as a job's argument (RQ keeps meta itself)."""
        plain: dict[str, Any] = {} if self.id is None else {"id": self.id}
        plain["messages"] = self.messages
        if self.train_on != "all":
            plain["train_on"] = self.train_on
        if self.weight != 1.0:
            plain["weight"] = self.weight
        if self.rating is not None:
            plain["rating"] = self.rating
        if self.method != "imitate":
            plain["method"] = self.method
        for name in ("rejected", "comment", "tools", "chat_template_kwargs", *(["meta"] if meta else [])):
            if getattr(self, name):
                plain[name] = getattr(self, name)
        return plain

    def __repr__(self) -> str:
        return f"Transcript(id={self.id!r}, {len(self.messages)} messages)"


FIELDS = (*Transcript.__slots__, "chosen")
"""What the plain map may have."""


def check_id(value: Any, where: str = "id") -> str:
    """A transcript's id, which is also its job's id. Raises InvalidTranscript."""
    if not isinstance(value, str):
        raise InvalidTranscript(where, f"must be a string, not {type(value).__name__}")
    text = str.__str__(value)
    if not ID_PATTERN.fullmatch(text):
        raise InvalidTranscript(where, "may hold only A-Z a-z 0-9 _ - and must not be empty")
    if len(text) > MAX_ID:
        raise InvalidTranscript(where, f"has {len(text)} characters, the limit is {MAX_ID}; use a hash of it")
    return text


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise InvalidTranscript("tools", f"must be a list of function definitions, not {kind(tools)}")
    if len(tools) > MAX_TOOLS:
        raise InvalidTranscript("tools", f"has {len(tools)} entries, the limit is {MAX_TOOLS}")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if as_map(tool, where).get("type") != "function":
            raise InvalidTranscript(f"{where}.type", 'must be "function"')
        as_name(as_map(tool.get("function"), f"{where}.function").get("name"), f"{where}.function.name")
    return tools


def _template_kwargs(kwargs: Any) -> dict[str, Any]:
    named = as_map({} if kwargs is None else kwargs, "chat_template_kwargs")
    for name in named:
        if name in RESERVED_TEMPLATE_KWARGS:
            raise InvalidTranscript("chat_template_kwargs", f"{name} is reserved for the rendering itself; remove it")
    return named


def _about(train_on: Any, messages: list[dict[str, Any]], rejected: Any, *, said: bool) -> Any:
    """`train_on` of what was said of an answer: that is about the last one, not about all. said: something was."""
    if not said:
        return train_on
    if rejected is not None and train_on not in ("all", "last", [len(messages) - 1], (len(messages) - 1,)):
        raise InvalidTranscript("train_on", "names other turns than the one that chosen and rejected answer")
    return "last" if isinstance(train_on, str) and train_on == "all" else train_on


def _train_on(train_on: Any, messages: list[dict[str, Any]], left_out: set[int]) -> str | list[int]:
    """`train_on` in its one form; the messages `left_out` by their own weight are in none."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trainable = [i for i in turns if says_something(messages[i])]
    if not trainable:
        raise InvalidTranscript("messages", "no assistant turn has content, reasoning or tool calls to train on")
    chosen = [i for i in trainable if i not in left_out]
    if not chosen:
        raise InvalidTranscript("messages", "every assistant turn has weight 0: there is nothing to train")
    if isinstance(train_on, str):
        if train_on not in ("all", "last"):
            raise InvalidTranscript("train_on", 'must be "all", "last" or a list of indices into messages')
        if train_on == "last" and turns[-1] not in trainable:
            raise InvalidTranscript("train_on", f"the last assistant turn, messages[{turns[-1]}], is empty; remove it")
        if train_on == "last" and turns[-1] in left_out:
            raise InvalidTranscript("train_on", f"the last assistant turn, messages[{turns[-1]}], has weight 0")
        if train_on == "all" and chosen != trainable:
            return [i for i in chosen if i > opening(messages)] or chosen
        return str.__str__(train_on)
    if not isinstance(train_on, list | tuple) or not train_on:
        raise InvalidTranscript("train_on", 'must be "all", "last" or a non-empty list of indices into messages')
    if len(train_on) > len(messages):
        raise InvalidTranscript("train_on", f"names {len(train_on)} turns of {len(messages)} messages")
    for position, index in enumerate(train_on):
        where = f"train_on[{position}]"
        if not isinstance(index, int) or isinstance(index, bool):
            raise InvalidTranscript(where, f"must be an integer, not {kind(index)}")
        if not 0 <= index < len(messages):
            raise InvalidTranscript(where, f"is outside the {len(messages)} messages; indices start at 0")
        if index not in trainable:
            raise InvalidTranscript(where, f"messages[{index}] is not an assistant turn that says something")
        if index in left_out:
            raise InvalidTranscript(where, f"messages[{index}] has weight 0; take it out here, or give it weight 1")
    if len(set(train_on)) != len(train_on):
        raise InvalidTranscript("train_on", "names a turn twice; name each turn once")
    return sorted(int(index) for index in train_on)


def trained_turns(messages: list[dict[str, Any]], train_on: str | list[int]) -> list[int]:
    """Indices of the turns to train, of normalised messages. Of "all", turns that say nothing and an opening greeting
    are left out."""
    if isinstance(train_on, list):
        return train_on
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        return turns[-1:]
    turns = [i for i in turns if says_something(messages[i])]
    return [i for i in turns if i > opening(messages)] or turns


def opening(messages: list[dict[str, Any]]) -> int:
    """Index of the first message by a user; -1 when there is none. What an assistant says before it answers nobody: a
    greeting, which is context and not trained by "all"."""
    return next((i for i, message in enumerate(messages) if message["role"] == "user"), -1)


def _weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise InvalidTranscript("weight", f"must be a number, not {kind(weight)}")
    if not 0 < weight <= 1 or not math.isfinite(weight):
        raise InvalidTranscript("weight", "must be above 0 and at most 1; leave out what should not be trained")
    return float(weight)
