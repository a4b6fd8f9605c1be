"""A record: one answer as others keep it, with what its user said of it, before it is a transcript.

Ratings, rejected answers and comments stay apart from the conversation here. `transcript` says what of a record can be
queued, and as which kind.
Invariant: a record that is rated 0 or below is never a demonstration and never liked; a rejected answer is only ever
the rejected one.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from .. import reasoning, users
from ..errors import InvalidTranscriptError
from ..plain import MAX_DEPTH

Pairs = Literal["learn", "chosen", "leave-out"]


class Reason(Enum):
    """Why records are left out, which is no fault of theirs: what one and several are called, and why."""

    DISLIKED = ("disliked answer", "disliked answers", "--dislikes leave-out was given")
    NEUTRAL = (
        "answer that was neither liked nor disliked",
        "answers that were neither liked nor disliked",
        "what the model should learn from that is not known",
    )
    UNRATED = (
        "feedback entry without a rating",
        "feedback entries without a rating",
        "whether these answers were liked is not known",
    )
    PAIR = ("preference pair", "preference pairs", "--pairs leave-out was given")
    LONG_PAIR = (
        "preference pair with answers of several messages",
        "preference pairs with answers of several messages",
        "one message is preferred to another. To train the chosen answers as demonstrations, use --pairs chosen",
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
    rating: from -1 to 1: above 0: liked; below: disliked; 0: neither, or both; None: nobody rated it.
    rejected: messages that somebody found worse than the answer at the end of `fields["messages"]`.
    comment: what the user said of the answer.
    users: who had asked, and who said this of the answer, as far as the source names them beside the conversation.
    """

    fields: dict[str, Any]
    id: Any = None
    rating: float | None = None
    rejected: list[Any] | None = None
    comment: str | None = None
    users: tuple[str, ...] = ()

    def transcript(self, *, dislikes: bool = True, pairs: Pairs = "learn") -> dict[str, Any]:
        """The fields of the transcript that says the same: a demonstration, liked, disliked, or a correction.

        dislikes: whether disliked answers are used. pairs: used, only their chosen answers as demonstrations, or not.
        Raises LeaveOut.
        """
        if self.rating is None and self.comment is not None:
            raise LeaveOut(Reason.UNRATED)  # the comment may be a complaint
        if self.rating == 0:
            raise LeaveOut(Reason.NEUTRAL)
        if self.rating is not None and self.rating < 0 and not dislikes:
            raise LeaveOut(Reason.DISLIKED)
        fields = self.fields if self.rating is None else self.fields | {"rating": self.rating}
        if self.users:
            fields = fields | {"meta": users.into(fields.get("meta"), self.users)}
        if self.rejected is None or pairs == "chosen":
            return fields
        if pairs == "leave-out":
            raise LeaveOut(Reason.PAIR)
        if len(self.rejected) != 1 or isinstance(fields.get("train_on"), list):
            raise LeaveOut(Reason.LONG_PAIR)
        return fields | {"rejected": self.rejected[0]}


def differ(chosen: list[Any], rejected: list[Any]) -> None:
    """Raises InvalidTranscriptError where both are one answer, but for white space around it."""
    try:
        same = list(map(_gist, chosen)) == list(map(_gist, rejected))
    except RecursionError:
        same = False  # too deep for a transcript, which says so
    if same:
        raise InvalidTranscriptError("rejected", "is the very answer that was chosen; there is nothing to prefer")


def _gist(answer: Any) -> Any:
    """What an answer says, in whichever form it is."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, dict):
        return [answer.strip() if isinstance(answer, str) else answer]
    parts = answer.get("content")
    if isinstance(parts, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        parts = "".join(part["text"] for part in parts)
    content = parts.strip() if isinstance(parts, str) else parts
    more = [answer[name] for name in (*reasoning.FIELDS, "tool_calls", "function_call") if answer.get(name)]
    return [content, *more]


def record_id(source: Any, fields: dict[str, Any], *, unique: bool, said_by: tuple[str, ...] = ()) -> str:
    """The transcript's id: the same whenever the same record is read.

    unique: ids of this source are unique wherever it comes from (a log's), so `source` alone decides. Otherwise, as in
    a data set whose records are numbered, the content decides too. Without `source` the content decides alone. said_by:
    its users, who belong to the content: what two of them say alike is said twice, and each may be forgotten.
    """
    said = {name: item for name, item in fields.items() if name not in ("id", "meta")}
    content = hashlib.sha256(canonical(said | ({"users": said_by} if said_by else {}))).hexdigest()
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
