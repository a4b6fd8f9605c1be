"""Plain values: the part of validation that knows nothing of conversations.

Copies what an application hands in down to JSON's own types, bounded in depth and size, so that everything after it may
trust its input. Must not know: Redis.
Invariants: the only exception is `InvalidTranscript` (`ValueError` for `parse_json`), whatever the input; what comes
out is made of dict (str keys), list, str (UTF-8 encodable), int (64 bits), finite float, bool and None, shares nothing
with the input, and fits msgpack. Errors never quote a text: transcripts stay out of logs.
"""

import json
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from .errors import InvalidTranscript as InvalidTranscript

MAX_DEPTH = 32
"""Levels of lists and objects within one field."""

VALUE_BYTES = 16
"""What a value is charged beside its text; msgpack never spends more, so a bound here bounds the message."""


def shown(name: object) -> str:
    """A field's name as an error may show it: short, ASCII, quoted."""
    if not isinstance(name, str):
        return f"<{type(name).__name__}>"
    return ascii(name[:40]) + ("..." if len(name) > 40 else "")


def path(field: str, key: str) -> str:
    return f"{field}.{key}" if len(key) <= 40 and key.isascii() and key.isidentifier() else f"{field}[{shown(key)}]"


class PlainCopy:
    """`PlainCopy(limit)(value, field)` returns a plain copy; one instance spends one budget of bytes over its calls."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def __call__(self, value: Any, field: str, depth: int = 0) -> Any:
        """Raises InvalidTranscript. A value that contains itself ends at `MAX_DEPTH`."""
        if depth > MAX_DEPTH:
            raise InvalidTranscript(field, f"nested more than {MAX_DEPTH} levels deep; flatten it")
        if isinstance(value, str):
            return self._text(value, field)
        self._spend(VALUE_BYTES, field)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                raise InvalidTranscript(field, "an integer of more than 64 bits; send it as a string")
            return int(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise InvalidTranscript(field, "NaN and infinity are not JSON; send null or a string")
            return float(value)
        if isinstance(value, list):
            return [self(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {
                self._key(key, field): self(item, path(field, str.__str__(key)), depth + 1)
                for key, item in value.items()
            }
        raise InvalidTranscript(
            field, f"{type(value).__name__} is not a JSON type; convert it first (objects of a client: model_dump())"
        )

    def _key(self, key: Any, field: str) -> str:
        if not isinstance(key, str):
            raise InvalidTranscript(field, f"has a key of type {type(key).__name__}; JSON's keys are strings")
        return self._text(key, field)

    def _text(self, text: str, field: str) -> str:
        text = str.__str__(text)  # an enum of strings becomes its value
        try:
            self._spend(VALUE_BYTES + len(text.encode()), field)
        except UnicodeEncodeError:
            raise InvalidTranscript(field, "holds a lone surrogate, which is not UTF-8; repair it") from None
        return text

    def _spend(self, size: int, field: str) -> None:
        self.left -= size
        if self.left < 0:
            raise InvalidTranscript(field, f"here the size passes the limit of {self.limit:,} bytes; shorten it")


def parse_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no infinity. Raises ValueError, which quotes nothing of the text."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None
    except ValueError as error:  # a constant, or an integer longer than Python converts
        raise ValueError(f"not valid JSON: {error}" if error.args == (_CONSTANT,) else "a number too long") from None


_CONSTANT = "NaN and Infinity are not allowed"


def _no_constant(name: str) -> Any:
    raise ValueError(_CONSTANT)


def known(
    raw: dict[str, Any],
    names: Collection[str],
    where: str,
    dropped: Collection[str] = (),
    whose: str = "",
    hints: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The fields of `raw` that are among `names` and say something.

    Clients log many that are empty, or in `dropped`: those go. Any other is an error, with what `hints` says of it.
    """
    fields = {}
    for name, value in raw.items():
        if name in names:
            if value not in (None, [], {}) or name == "content":
                fields[name] = value
        elif name not in dropped and value not in (None, [], {}, ""):
            hint = f"is no field that a model reads or writes; remove it. Known{whose}: {listed(names)}"
            raise InvalidTranscript(path(where, name), hints.get(name, hint))
    return fields


def as_map(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidTranscript(where, f"must be an object, not {kind(value)}")
    return value


def as_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidTranscript(where, f"must be a string, not {kind(value)}")
    return value


def as_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidTranscript(where, "must be a non-empty string")
    return value


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def listed(names: Collection[str]) -> str:
    return ", ".join(names)
