"""What users say of an answer, as a number from -1 (disliked) to 1 (liked).

Invariant: what is not known to be a like raises, or comes out as 0 or below; what is not known to be a dislike raises,
or comes out as 0 or above.
"""

import math
from typing import Any

from ..errors import InvalidTranscriptError
from ..plain import path
from . import rating_names
from .rating_names import Says
from .record import LeaveOut, Reason

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
    return [name for name, item in value.items() if item not in _EMPTY and rating_names.says(name) is not None]


def together(marks: list[float | None]) -> float | None:
    """One rating for several: the weakest if they agree, 0 if they do not; None if there is none."""
    found = [mark for mark in marks if mark is not None]
    if not found:
        return None
    if all(mark > 0 for mark in found) or all(mark < 0 for mark in found):
        return min(found, key=abs)
    return 0.0


def beside(value: dict[str, Any], where: str = "") -> float | None:
    """The rating beside a conversation; None if there is none.

    Raises LeaveOut where all there is may be a rating, and does not say like or dislike."""
    found = [(name, value[name], path(where, name).lstrip(".")) for name in fields(value)]
    clear = [item for item in found if not _unclear(*item[:2])]
    rating = together([0.0 if _refused(value) else None, *_marks(clear, score=False)])
    if rating is None and len(clear) < len(found):
        raise LeaveOut(Reason.UNRATED)
    return rating


def of_scores(scores: list[tuple[Any, Any]], where: str) -> float | None:
    """The rating in named scores; None if there are none.

    scores: (name, value), from 0 (bad) to 1 (good) or from -1. Raises LeaveOut when no name is that of a like or
    dislike: what is good there is not known.
    """
    said = [(name, value) for name, value in scores if value is not None]
    known = [(name, value, where) for name, value in said if isinstance(name, str) and _is_score(name, value)]
    if said and not known:
        raise LeaveOut(Reason.SCORED)
    return together(_marks(known, score=True))


def inside(mark: Any) -> Any:
    """The value of a score that is a map of its own; any other as it is."""
    for name in ("score", "value") if isinstance(mark, dict) else ():
        if mark.get(name) is not None:
            return mark[name]
    return mark


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _is_score(name: str, value: Any) -> bool:
    plain = rating_names.plain(name)
    if plain in rating_names.FIELDS:
        return plain in rating_names.SCORES
    return rating_names.says(name) is not None and not _unclear(name, value)


def _marks(named: list[tuple[str, Any, str]], *, score: bool) -> list[float | None]:
    """The rating of each; a like that is false says nothing where the dislike is true."""
    found = [(rating_names.says(name), _named(name, value, where, score=score)) for name, value, where in named]
    disliked = any(says is Says.AGAINST and mark is not None for says, mark in found)
    return [mark for says, mark in found if not (disliked and says is Says.FOR and mark == 0)]


def _named(name: str, value: Any, where: str, *, score: bool) -> float | None:
    plain, says = rating_names.plain(name), rating_names.says(name)
    if rating_names.counts(name) and says is not Says.SIGNED and isinstance(value, int | float) and value > 1:
        value = 1
    if says is Says.AGAINST:
        return -1.0 if opinion(value, where) > 0 else None
    halves, bad_zero = score or rating_names.halves(name), score or plain in rating_names.BAD_ZERO
    mark = opinion(value, where, halves=halves, bad_zero=bad_zero)
    return max(0.0, mark) if says is Says.FOR else mark


def _unclear(name: str, value: Any) -> bool:
    """Whether only the words of its name say that it is a rating, and its value does not."""
    if rating_names.plain(name) in rating_names.FIELDS:
        return False
    try:
        opinion(value, name)
    except ScaleError:
        return False
    except (InvalidTranscriptError, LeaveOut):
        return True
    return False


def _refused(value: dict[str, Any]) -> bool:
    """Whether a column says that the answer was rejected, or not chosen, without another to compare it with."""
    for name, item in value.items():
        word = item.strip().lower() if isinstance(item, str) else item
        if rating_names.plain(name) in ("rejected", "isrejected") and word in (True, "true"):
            return True
        if rating_names.plain(name) in ("chosen", "ischosen") and word in (False, "false"):
            return True
    return False
