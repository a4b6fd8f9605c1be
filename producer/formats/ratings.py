"""What users say of an answer, as a number from -1 (disliked) to 1 (liked).

Invariant: what is not known to be a like raises, or comes out as 0 or below; what is not known to be a dislike raises,
or comes out as 0 or above.
"""

import math
from typing import Any

from ..errors import InvalidTranscriptError
from ..plain import path
from .record import LeaveOut, Reason

SIGNED = frozenset({
    "rating", "score", "thumb", "thumbs", "vote", "feedback", "userfeedback", "userscore", "userrating",
    "humanfeedback", "humanscore", "humanrating",
})  # fmt: skip
"""Names that hold a like or a dislike; without capitals, spaces, - and _, as `_plain` makes them."""

FOR = frozenset({"thumbsup", "upvote", "upvoted", "like", "liked", "likes", "helpful"})
"""Names that say like where they are true, and nothing where they are not."""

AGAINST = frozenset({"thumbsdown", "dislike", "disliked", "dislikes", "downvote", "downvoted"})
"""Names that say dislike where they are true, and nothing where they are not."""

SCORES = SIGNED | FOR | AGAINST
"""Names of scores that say like or dislike."""

FIELDS = SCORES | {"label", "ktotag", "reward", "accepted", "preferred", "ispreferred", "reaction"}
"""Names of fields beside a conversation that rate it, in every format."""

_FOR = FOR | {"accepted", "preferred", "ispreferred"}
_HALVES = ("score", "userscore", "humanscore", "reward")
"""Fields that count from 0 (bad) to 1 (good) where they are not negative."""
_BAD_ZERO = ("label", "ktotag")
"""Fields where 0 stands for false."""

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


def opinion(value: Any, where: str, *, halves: bool = False, bad_zero: bool = False) -> float:
    """The rating that `value` stands for. halves: only above a half it is good, and 0 where it is not known to be bad.
    bad_zero: 0 is a dislike.

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
    if value == 0 and bad_zero:
        return -1.0
    return max(0.0, 2.0 * value - 1.0) if halves and value >= 0 else float(value)


def fields(value: dict[str, Any]) -> list[str]:
    """Names of the fields of `value` that rate it."""
    return [name for name, item in value.items() if _plain(name) in FIELDS and item not in (None, "", [], {})]


def together(marks: list[float | None]) -> float | None:
    """One rating for several: the weakest if they agree, 0 if they do not; None if there is none."""
    found = [mark for mark in marks if mark is not None]
    if not found:
        return None
    if all(mark > 0 for mark in found) or all(mark < 0 for mark in found):
        return min(found, key=abs)
    return 0.0


def beside(value: dict[str, Any], where: str = "") -> float | None:
    """The rating beside a conversation; None if there is none."""
    return together([_named(name, value[name], path(where, name).lstrip(".")) for name in fields(value)])


def of_scores(scores: list[tuple[Any, Any]], where: str) -> float | None:
    """The rating in named scores; None if there are none.

    scores: (name, value), from 0 (bad) to 1 (good) or from -1. Raises LeaveOut when no name is that of a like or
    dislike: what is good there is not known.
    """
    said = [(name, value) for name, value in scores if value is not None]
    known = [(name, value) for name, value in said if isinstance(name, str) and _plain(name) in SCORES]
    if said and not known:
        raise LeaveOut(Reason.SCORED)
    return together([_named(name, value, where, score=True) for name, value in known])


def _named(name: str, value: Any, where: str, *, score: bool = False) -> float | None:
    plain = _plain(name)
    if plain in AGAINST:
        return -1.0 if opinion(value, where) > 0 else None
    mark = opinion(value, where, halves=score or plain in _HALVES, bad_zero=score or plain in _BAD_ZERO)
    return max(0.0, mark) if plain in _FOR else mark


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
