"""Whose a transcript is: who had asked, and who said what of the answer. `tandem forget` looks for them in its meta.

`meta["user"]` is one name, or a list of them where there are several.

Must not know: Redis.
Invariants: no name is lost because there is another; what an application put there stays; errors quote no name.
"""

from collections.abc import Iterable
from typing import Any

from .plain import InvalidTranscript, path

MAX_NAME = 1024
"""Characters of a name."""

LOGGED = ("user", "safety_identifier")
"""Fields of OpenAI's requests that name who asks."""

_FIELDS = frozenset({
    "user", "userid", "enduser", "enduserid", "safetyidentifier", "lsuserid", "langfuseuserid", "userapikeyuserid",
    "userapikeyenduserid", "authoruserid", "annotator", "annotatorid", "rater", "raterid", "reviewer", "reviewerid",
})  # fmt: skip
"""Fields of exports that do, or that name who rated; without capitals, - and _."""


def beside(*places: Any) -> tuple[str, ...]:
    """The users that fields of these maps name, each once; what is no map names none. Raises InvalidTranscript."""
    return distinct(
        found
        for place in places
        for name, given in (place.items() if isinstance(place, dict) else ())
        if "".join(letter for letter in name.lower() if letter.isalnum()) in _FIELDS
        for found in _name(given, path("", name).lstrip("."))
    )


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def logged(value: dict[str, Any]) -> tuple[str, ...]:
    """The users that a request names, beside whose messages OpenAI's clients log them. Raises InvalidTranscript."""
    return distinct(found for name in LOGGED for found in _name(value.get(name), name))


def of(meta: Any) -> tuple[str, ...]:
    """The users that a transcript's meta names; what is no name there is passed over."""
    given = meta.get("user") if isinstance(meta, dict) else None
    return distinct(str(one) for one in (given if isinstance(given, list) else [given]) if isinstance(one, str | int))


def into(meta: Any, names: Iterable[str]) -> Any:
    """`meta` with these users beside those that it names; as it is where they are in it, or it is no map."""
    if meta is not None and not isinstance(meta, dict):
        return meta  # refused where a transcript is checked
    new = [name for name in distinct(names) if name not in of(meta)]
    if not new:
        return meta
    known = (meta or {}).get("user")
    if known not in (None, "", []):
        new = [*(known if isinstance(known, list) else [known]), *new]
    return (meta or {}) | {"user": new[0] if len(new) == 1 else new}


def _name(given: Any, where: str) -> Iterable[str]:
    """None for what names nobody: in data sets a column of the same name may hold something else."""
    if isinstance(given, dict):
        given = given.get("id")
    if isinstance(given, int) and not isinstance(given, bool) and abs(given) < 2**64:
        given = str(given)
    if not isinstance(given, str) or not given.strip():
        return ()
    if len(given) > MAX_NAME:
        raise InvalidTranscript(where, f"names a user with {len(given):,} characters, the limit is {MAX_NAME:,}")
    return (given,)
