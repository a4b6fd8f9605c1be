"""A record: one answer as others keep it, with what its user said of it, before it is a transcript.

Ratings, rejected answers and comments stay apart from the conversation here, so that losses of their own can be given
to them later. Today only demonstrations can be queued: `demonstration` says what of a record is one. Invariant: a
record that is rated 0 or below is never a demonstration; of a pair, only the chosen answer can be.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..plain import MAX_DEPTH


class Reason(Enum):
    """Why records are left out, which is no fault of theirs: what one and several are called, and why."""

    DISLIKED = ("disliked answer", "disliked answers", "Tandem cannot yet learn from dislikes")
    UNRATED = (
        "feedback entry without a rating",
        "feedback entries without a rating",
        "whether these answers were liked is not known",
    )
    PAIR = (
        "preference pair",
        "preference pairs",
        "Tandem cannot yet learn from pairs. To train the chosen answers as demonstrations, use --pairs chosen",
    )
    SCORED = (
        "answer with unknown scores",
        "answers with unknown scores",
        "no name of a score says like or dislike. To train these answers, remove their scores",
    )
    FAILED = ("request that failed", "requests that failed", "there is no answer to learn")
    CUT_OFF = ("answer that was cut off", "answers that were cut off", "the model would learn to stop in the middle")
    NO_CHAT = ("call that is no chat", "calls that are no chat", "only chat completions are read")
    REDACTED = (
        "record without its full text",
        "records without their full text",
        "the logger redacted or shortened it",
    )

    def sentence(self, count: int) -> str:
        one, several, why = self.value
        return f"{count:,} {one if count == 1 else several} left out: {why}"


class LeaveOut(Exception):
    """No error: the record is sound, and is left out and counted."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One conversation and what is known of its answer.

    fields: those of a transcript, not yet validated; with an id only where it is meant as a transcript's.
    id: the source's, as it stands there; None: it has none.
    rating: above 0: liked; 0 or below: not liked; None: nobody rated it. From -1 to 1.
    rejected: messages that somebody found worse than the answer at the end of `fields["messages"]`.
    comment: what the user said of the answer.
    """

    fields: dict[str, Any]
    id: Any = None
    rating: float | None = None
    rejected: list[Any] | None = None
    comment: str | None = None

    def demonstration(self, *, chosen: bool = False) -> dict[str, Any]:
        """The fields of a transcript that shows what is good. chosen: the better answers of pairs count as such.

        Raises LeaveOut.
        """
        if self.rating is not None and not self.rating > 0:
            raise LeaveOut(Reason.DISLIKED)
        if self.rating is None and self.comment is not None:
            raise LeaveOut(Reason.UNRATED)  # the comment may be a complaint
        if self.rejected is not None and not chosen:
            raise LeaveOut(Reason.PAIR)
        return self.fields


def record_id(source: Any, fields: dict[str, Any], *, unique: bool) -> str:
    """The transcript's id: the same whenever the same record is read.

    unique: ids of this source are unique wherever it comes from (a log's), so `source` alone decides. Otherwise, as in
    a data set whose records are numbered, the content decides too. Without `source` the content decides alone.
    """
    content = hashlib.sha256(canonical({k: v for k, v in fields.items() if k not in ("id", "meta")})).hexdigest()
    if isinstance(source, int) and not isinstance(source, bool):
        source = str(source)
    if not isinstance(source, str) or not source:
        return content[:32]
    if unique and _PLAIN_ID.fullmatch(source):
        return source
    if not unique and _SHORT_ID.fullmatch(source):
        return f"{source}-{content[:16]}"
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass"))
    if not unique:
        digest.update(content.encode())
    return digest.hexdigest()[:32]


_PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHORT_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")


def canonical(value: Any) -> bytes:
    """JSON of `value` that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def text_in(value: Any, depth: int = 0) -> list[str]:
    """All strings of `value`, as deep as a transcript may be."""
    if isinstance(value, str):
        return [value]
    if depth > MAX_DEPTH or not isinstance(value, dict | list):
        return []
    items = value.values() if isinstance(value, dict) else value
    return [text for item in items for text in text_in(item, depth + 1)]
