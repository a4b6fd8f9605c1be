"""Which names of columns and scores rate an answer, and what a true there says.

A name in one of the lists is meant as a rating: a value that is none is an error. Any other name is judged by its
words, so that no dislike is overlooked; what such a column holds may be no rating at all.
"""

import re
from enum import Enum


class Says(Enum):
    SIGNED = "a like or a dislike"
    FOR = "a like where it is true, and nothing where it is not"
    AGAINST = "a dislike where it is true, and nothing where it is not"


_SIGNED = frozenset({
    "rating", "score", "thumb", "thumbs", "vote", "feedback", "userfeedback", "userscore", "userrating",
    "humanfeedback", "humanscore", "humanrating",
})  # fmt: skip
_FOR = frozenset({"thumbsup", "upvote", "upvoted", "like", "liked", "likes", "helpful"})
_AGAINST = frozenset({"thumbsdown", "dislike", "disliked", "dislikes", "downvote", "downvoted"})
SCORES = _SIGNED | _FOR | _AGAINST
"""Names of scores that say like or dislike; without capitals, spaces, - and _, as `plain` makes them."""

_FIELDS_FOR = frozenset({"accepted", "preferred", "ispreferred"})
FIELDS = SCORES | _FIELDS_FOR | {"label", "ktotag", "reward", "reaction"}
"""Names of fields beside a conversation that rate it, in every format."""

HALVES = frozenset({"score", "userscore", "humanscore", "reward"})
"""Fields that count from 0 (bad) to 1 (good) where they are not negative."""
BAD_ZERO = frozenset({"label", "ktotag"})
"""Fields where 0 stands for false."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_A-Za-z]+")
_WORDS_AGAINST = frozenset({
    "dislike", "dislikes", "disliked", "downvote", "downvotes", "downvoted", "thumbdown", "thumbsdown", "unhelpful",
})  # fmt: skip
_WORDS_FOR = frozenset({
    "like", "likes", "liked", "upvote", "upvotes", "upvoted", "thumbup", "thumbsup", "accepted", "helpful",
})  # fmt: skip
_WORDS_SIGNED = frozenset({
    "thumb", "thumbs", "vote", "votes", "rating", "ratings", "feedback", "feedbacks",
})  # fmt: skip
_BY = frozenset({"user", "users", "human", "humans"})
_SCORE = frozenset({"score", "scores"})
_UP, _DOWN = frozenset({"up", "positive"}), frozenset({"down", "negative", "not", "non"})
_ABOUT = frozenset({"id", "ids", "uuid", "at", "date", "time", "timestamp", "chosen", "rejected"})
"""Words of names that say when or by which number it was rated, or that an answer of a pair was."""
_COUNTED = frozenset({"likes", "dislikes", "upvotes", "downvotes", "count", "counts", "num", "total"})


def plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def words(name: str) -> frozenset[str]:
    """The words of a name: thumbDown and thumb_down are thumb and down."""
    return frozenset(word.lower() for word in _WORD.findall(name[:200]))


def says(name: str) -> Says | None:
    """None for a name that rates nothing."""
    known = plain(name)
    if known in _AGAINST:
        return Says.AGAINST
    if known in _FOR or known in _FIELDS_FOR:
        return Says.FOR
    if known in FIELDS:
        return Says.SIGNED
    found = words(name)
    if found & _ABOUT:
        return None
    if found & _WORDS_AGAINST:
        return Says.AGAINST
    if found & _WORDS_FOR:
        return Says.AGAINST if found & _DOWN else Says.FOR
    if not found & _WORDS_SIGNED and not (found & _BY and found & _SCORE):
        return None
    if found & _DOWN:
        return Says.AGAINST
    return Says.FOR if found & _UP else Says.SIGNED


def counts(name: str) -> bool:
    """Whether a number there tells how many said so."""
    return bool(words(name) & _COUNTED)


def halves(name: str) -> bool:
    return plain(name) in HALVES or (plain(name) not in FIELDS and bool(words(name) & _SCORE))
