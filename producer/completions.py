"""A recorded completion: what a server answered, kept for a while so that an application can say something of it later.

The server saves one under a random key and tells the client that key; feedback names nothing but the key. In Redis a
record is one string of msgpack under a time to live; an index by expiry keeps the sum of all records below a bound.

Must not know: the worker, vLLM.
Invariants: a `Completion` that exists is plain and bounded; a record is never overwritten; one that is read back is
checked like one that is made, so whoever can write to Redis cannot crash a reader; no text is in an error or in `repr`.
"""

import base64
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import redis

from . import completion_books, keys
from .errors import InvalidTranscriptError, UnknownCompletionError
from .exchange import Exchange, run, run_async
from .plain import PlainCopy, as_map, as_text, kind
from .serializer import MsgpackSerializer
from .transcript import MAX_BYTES

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{22}")
"""128 random bits as url-safe base64 without padding. What does not look like this names no record."""

FORMAT = 1
"""Of a record in Redis. A reader refuses any other."""

MAX_TOKENS = 1 << 20
MAX_NAME = 1024
"""Characters of the completion's id, the model's name and the user's."""

MAX_RECORD = 3 * MAX_BYTES + 24 * MAX_TOKENS
"""Bytes of the largest record that a reader decodes."""

OVERHEAD = 200
"""Bytes that a record is charged beside its value: about what Redis takes for its name, its expiry and the index."""


def new_key() -> str:
    """A key that nobody can guess. It begins with no dash, so that a command line takes it for no option."""
    while (key := base64.urlsafe_b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()).startswith("-"):
        pass
    return key


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Completion:
    """What was asked and answered. Raises InvalidTranscriptError, naming the field, for what cannot be kept.

    key: the record's name, 128 random bits (`new_key`). Feedback accepts no other name.
    id: the completion's id as the client sees it; it is never used to look something up, since a client can choose it.
    created: Unix time in seconds. model: its name in the request. user: the request's `user`, or None.
    messages, tools, chat_template_kwargs: as the request had them. answer: one message by the assistant.
    token_ids: the sampled tokens. logprobs: theirs, natural logarithms, or None where they are not known.
    versions: the first and the last version of the weights that generated the answer.
    """

    id: str
    created: float
    model: str
    messages: list[dict[str, Any]]
    answer: dict[str, Any]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    versions: tuple[int, int] = (0, 0)
    user: str | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    key: str = field(default_factory=new_key)

    def __post_init__(self) -> None:
        if not is_key(self.key):
            raise InvalidTranscriptError("key", "must be 22 characters of A-Z a-z 0-9 _ -: make it with new_key()")
        copy = PlainCopy(MAX_BYTES)
        messages = copy(self.messages, "messages")
        if not isinstance(messages, list) or not messages:
            raise InvalidTranscriptError("messages", "must be a non-empty list of messages")
        answer = as_map(copy(self.answer, "answer"), "answer")
        if answer.get("role") != "assistant":
            raise InvalidTranscriptError("answer.role", "must be assistant")
        tools = copy(self.tools, "tools")
        if tools is not None and not isinstance(tools, list):
            raise InvalidTranscriptError("tools", f"must be a list, not {kind(tools)}")
        token_ids = _tokens(self.token_ids)
        checked: dict[str, Any] = {
            "id": _name(self.id, "id"),
            "created": _number(self.created, "created"),
            "model": _name(self.model, "model"),
            "messages": [as_map(message, f"messages[{at}]") for at, message in enumerate(messages)],
            "answer": answer,
            "token_ids": token_ids,
            "logprobs": None if self.logprobs is None else _logprobs(self.logprobs, len(token_ids)),
            "versions": _versions(self.versions),
            "user": None if self.user is None else _name(self.user, "user"),
            "tools": tools,
            "chat_template_kwargs": as_map(
                copy(self.chat_template_kwargs, "chat_template_kwargs"), "chat_template_kwargs"
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for everyone else

    def pack(self) -> bytes:
        """The record's value in Redis: all fields but the key."""
        plain = {name: getattr(self, name) for name in _FIELDS} | {"format": FORMAT}
        return MsgpackSerializer.dumps(plain)

    @classmethod
    def unpack(cls, key: str, raw: bytes) -> "Completion":
        """What `pack` gave. Raises InvalidTranscriptError for anything else."""
        if len(raw) > MAX_RECORD:
            raise InvalidTranscriptError("record", f"has {len(raw):,} bytes, the limit is {MAX_RECORD:,}")
        try:
            plain = MsgpackSerializer.loads(raw)
        except ValueError:
            raise InvalidTranscriptError("record", "is not a msgpack message") from None
        if not isinstance(plain, dict) or plain.pop("format", None) != FORMAT or set(plain) != set(_FIELDS):
            raise InvalidTranscriptError("record", f"has not the fields of format {FORMAT}")
        return cls(key=key, **plain)

    def __repr__(self) -> str:
        return f"Completion({len(self.messages)} messages, {len(self.token_ids)} tokens)"


_FIELDS = tuple(name for name in Completion.__slots__ if name != "key")


def is_key(key: Any) -> bool:
    return isinstance(key, str) and KEY_PATTERN.fullmatch(key) is not None


class Kept(StrEnum):
    """What became of a record that was to be saved."""

    KEPT = "kept"
    KNOWN = "known"
    """There is a record of this key already. It stays as it was."""
    TOO_LARGE = "too large"
    """It alone is more than all records together may take."""


def save_exchange(client: Any, completion: Completion, ttl: float, most: int, recount: bool) -> Exchange[Kept]:
    raw = completion.pack()
    charge = len(raw) + OVERHEAD
    if len(raw) > MAX_RECORD:
        return Kept.TOO_LARGE
    names = (keys.completion(completion.key), keys.COMPLETIONS, keys.COMPLETION_BYTES)
    values = (raw, charge, max(1, round(ttl * 1000)), most, keys.completion(""), completion.key, int(recount))
    answer = yield client.eval(completion_books.SAVE, len(names), *names, *values)
    return (Kept.KEPT, Kept.KNOWN, Kept.TOO_LARGE)[answer]


def load_exchange(client: Any, key: str) -> Exchange[Completion]:
    if not is_key(key):
        raise UnknownCompletionError("no completion is recorded under this key: it is none that a server gave out")
    try:
        raw = yield client.getrange(keys.completion(key), 0, MAX_RECORD)  # one byte more than a record may have
    except redis.exceptions.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        raise UnknownCompletionError("what is stored under this key is no recorded completion") from None
    if not raw:
        raise UnknownCompletionError(
            "no completion is recorded under this key: it has expired, made room for others, or was never recorded"
        )
    try:
        return Completion.unpack(key, raw)
    except InvalidTranscriptError as error:
        raise UnknownCompletionError(f"the completion recorded under this key cannot be read: {error}") from None


def save(client: Any, completion: Completion, ttl: float, most: int, *, recount: bool = False) -> Kept:
    """Keep `completion` for `ttl` seconds. client: redis-py's, with replies as bytes.

    most: bytes that all records together may take; those that expire first make room. Never overwrites a record.
    recount: add up what they take, in place of believing the sum in Redis: 2 us a record, for which Redis stands still.
    Raises redis-py's errors.
    """
    return run(save_exchange(client, completion, ttl, most, recount))


async def save_async(client: Any, completion: Completion, ttl: float, most: int, *, recount: bool = False) -> Kept:
    """`save` with redis-py's asyncio client."""
    return await run_async(save_exchange(client, completion, ttl, most, recount))


def load(client: Any, key: str) -> Completion:
    """The record of `key`. Raises UnknownCompletionError where there is none that can be read; redis-py's errors."""
    return run(load_exchange(client, key))


async def load_async(client: Any, key: str) -> Completion:
    """`load` with redis-py's asyncio client."""
    return await run_async(load_exchange(client, key))


def remove(client: redis.Redis, key: str) -> bool:
    """Delete the record of `key`; whether there was one. Not for a producer, who has no right to it."""
    names = (keys.completion(key), keys.COMPLETIONS, keys.COMPLETION_BYTES)
    return bool(client.eval(completion_books.REMOVE, len(names), *names, OVERHEAD, key))


def recorded(client: redis.Redis) -> Iterator[str]:
    """The keys of all records, of some perhaps twice; a few may have expired. Not for a producer."""
    for member, _ in client.zscan_iter(keys.COMPLETIONS, count=1000):
        key = member.decode(errors="replace").partition(":")[0]
        if is_key(key):
            yield key


def _name(value: Any, where: str) -> str:
    text: str = PlainCopy(8 * MAX_NAME)(as_text(value, where), where)
    if len(text) > MAX_NAME:
        raise InvalidTranscriptError(where, f"has {len(text)} characters, the limit is {MAX_NAME}")
    return text


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTranscriptError(where, f"must be a number, not {kind(value)}")
    if not abs(value) <= 1e15:
        raise InvalidTranscriptError(where, "is not finite, or beyond any date")
    return float(value)


def _tokens(value: Any) -> list[int]:
    if not isinstance(value, list | tuple):
        raise InvalidTranscriptError("token_ids", f"must be a list, not {kind(value)}")
    if len(value) > MAX_TOKENS:
        raise InvalidTranscriptError("token_ids", f"has {len(value):,} entries, the limit is {MAX_TOKENS:,}")
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        raise InvalidTranscriptError("token_ids", "must hold whole numbers from 0 to 2147483647")
    return list(value)


def _logprobs(value: Any, count: int) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise InvalidTranscriptError("logprobs", "must be a list with one number a token, or None")
    if not all(type(number) in (int, float) and -1e9 <= number <= 1e-3 for number in value):
        raise InvalidTranscriptError("logprobs", "must hold natural logarithms of probabilities: finite, not above 0")
    return [float(number) for number in value]


def _versions(value: Any) -> tuple[int, int]:
    fits = isinstance(value, list | tuple) and len(value) == 2
    if not fits or not all(type(version) is int and 0 <= version < 1 << 63 for version in value):
        raise InvalidTranscriptError("versions", "must be two whole numbers: the first version and the last")
    return (value[0], value[1])
