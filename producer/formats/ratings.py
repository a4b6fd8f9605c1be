"""What users say of an answer, as a number from -1 (disliked) to 1 (liked).

Invariant: what is not known to be a like raises, or comes out as 0 or below; nothing here guesses that something is
liked.
"""

import math
from typing import Any

from ..errors import InvalidTranscriptError
from ..plain import path
from .record import LeaveOut, Reason

NAMES = frozenset({
    "feedback", "rating", "score", "thumb", "thumbs", "thumbsup", "vote", "upvote", "upvoted", "like", "liked", "likes",
    "helpful", "userfeedback", "userscore", "userrating", "humanfeedback", "humanscore", "humanrating",
})  # fmt: skip
"""Names of scores that are a user's like or dislike; without capitals, spaces, - and _, as `_plain` makes them."""

AGAINST = frozenset({"thumbsdown", "dislike", "disliked", "dislikes", "downvote", "downvoted"})
"""Names of scores that are a dislike where they are true."""

FIELDS = NAMES | AGAINST | {"label", "ktotag", "reward", "accepted", "preferred", "ispreferred", "reaction"}
"""Names of fields beside a conversation that rate it, in every format."""

_HALVES = ("score", "userscore", "humanscore", "reward")
"""Fields that count from 0 (bad) to 1 (good) where they are not negative."""

_LIKES = ("up", "thumbs up", "thumbup", "like", "liked", "good", "positive", "yes", "true", "upvote", "helpful", "👍")
_DISLIKES = (
    "down",
    "thumbs down",
    "thumbdown",
    "dislike",
    "disliked",
    "bad",
    "negative",
    "no",
    "false",
    "downvote",
    "👎",
)
_WORDS = dict.fromkeys(_LIKES, 1.0) | dict.fromkeys(_DISLIKES, -1.0)


class ScaleError(InvalidTranscriptError):
    """A rating beyond -1 to 1. On such a scale a 1 may be the worst, so nothing of the file can be trusted."""


def opinion(value: Any, where: str, *, halves: bool = False) -> float:
    """The rating that `value` stands for. halves: 0 is bad, 1 is good, and a half is in between.

    Raises ScaleError for a number that is none from -1 to 1, InvalidTranscriptError for what is no rating.
    """
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if isinstance(value, str):
        word = " ".join(value.lower().replace("_", " ").replace("-", " ").split())
        if word in _WORDS:
            return _WORDS[word]
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, dict):
        said = {name: item for name, item in value.items() if isinstance(item, bool | int | float | str)}
        if (inner := beside(said, where)) is not None:
            return inner
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidTranscriptError(
            where, "is no like or dislike: send 1 or -1, true or false; remove the field if it is no rating"
        )
    if not -1 <= value <= 1:
        raise ScaleError(
            where,
            "is a rating beyond -1 to 1, so Tandem cannot tell which answers were liked: make it 1 for liked and -1 for"
            " disliked; remove the field if it is no rating",
        )
    return 2.0 * value - 1.0 if halves and value >= 0 else float(value)


def fields(value: dict[str, Any]) -> list[str]:
    """Names of the fields of `value` that rate it."""
    return [name for name, item in value.items() if _plain(name) in FIELDS and item not in (None, "", [], {})]


def beside(value: dict[str, Any], where: str = "") -> float | None:
    """The rating beside a conversation, the lowest if there are several; None if there is none."""
    found = [_named(name, value[name], path(where, name).lstrip(".")) for name in fields(value)]
    return min((mark for mark in found if mark is not None), default=None)


def of_scores(scores: list[tuple[Any, Any]], where: str) -> float | None:
    """The rating in named scores, the lowest if there are several; None if there are none.

    scores: (name, value), from 0 (bad) to 1 (good) or from -1. Raises LeaveOut when no name is that of a like or
    dislike: what is good there is not known.
    """
    said = [(name, value) for name, value in scores if value is not None]
    known = [(name, value) for name, value in said if isinstance(name, str) and _plain(name) in NAMES | AGAINST]
    if said and not known:
        raise LeaveOut(Reason.SCORED)
    found = [_named(name, value, where, halves=True) for name, value in known]
    return min((mark for mark in found if mark is not None), default=None)


def _named(name: str, value: Any, where: str, *, halves: bool = False) -> float | None:
    plain = _plain(name)
    if plain in AGAINST:
        return -1.0 if opinion(value, where) > 0 else None  # a dislike that is not there says nothing
    return opinion(value, where, halves=halves or plain in _HALVES)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
