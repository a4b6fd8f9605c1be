"""What users said so far of one recorded completion, as it is kept in Redis beside the record.

Ratings come in rounds. A round is one transcript with the mean of all its ratings; it is open while that waits in the
queue, or while its ratings cancel out and nothing does. When it has been taken for training, the next rating begins a
round of its own. Corrections and comments have a count by user instead: each begins anew once it was taken.

Must not know: Redis, RQ.
Invariants: what is read is bounded and well-formed, or nothing; users are digests (`user_digest`), never names.
"""

import hashlib
import math
import re
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Any

from .errors import InvalidTranscriptError
from .serializer import MsgpackSerializer

FORMAT = 1
MAX_USERS = 1000
"""Users whose opinions of one answer are told apart. Further ones wait until the round is trained."""

MAX_SIZE = 128 * 1024
"""Bytes of what is read; with all users told apart it is less."""

DIGEST = re.compile(r"[A-Za-z0-9_-]{22}|")
NEAR_ZERO = 1e-6
"""A mean rating below this is 0: what is left of sums like .1 + .2 - .3."""


def digest(*parts: str) -> str:
    """22 characters that stand for `parts`: 128 bits of their SHA-256."""
    whole = b"\0".join(part.encode(errors="surrogatepass") for part in ("tandem", *parts))
    return urlsafe_b64encode(hashlib.sha256(whole).digest()[:16]).rstrip(b"=").decode()


def user_digest(user: str | None) -> str:
    """How a user is named in Redis; "" for somebody unknown. Whoever has a list of users can tell which is which."""
    return digest("user", user) if user else ""


@dataclass
class Said:
    """round, votes: the current round of ratings, and its ratings by user. withdrawn: they cancel out, and nothing is
    queued. texts: kind and user -> how many of theirs came before, and a digest of the last."""

    round: int = 0
    votes: dict[str, float] = field(default_factory=dict)
    withdrawn: bool = False
    texts: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def rating(self) -> float | None:
        """The mean of the round's ratings; None when they cancel out."""
        mean = math.fsum(self.votes.values()) / max(1, len(self.votes))
        return None if abs(mean) < NEAR_ZERO else mean

    def vote(self, user: str, rating: float) -> None:
        """Count a user's rating instead of their last; 0 takes it back. Raises InvalidTranscriptError."""
        if rating == 0:
            self.votes.pop(user, None)
            return
        _make_room(self.votes, user, "rating")
        self.votes[user] = rating

    def next_round(self) -> None:
        self.round, self.votes, self.withdrawn = self.round + 1, {}, False

    def text(self, kind: str, user: str) -> tuple[int, str]:
        return self.texts.get(f"{kind}:{user}", (0, ""))

    def set_text(self, kind: str, user: str, count: int, last: str) -> None:
        """Raises InvalidTranscriptError."""
        _make_room(self.texts, f"{kind}:{user}", kind)
        self.texts[f"{kind}:{user}"] = (count, last)

    def forget(self, user: str) -> bool:
        """Take a user out; whether there was anything of theirs."""
        texts = [name for name in self.texts if name.partition(":")[2] == user]
        for name in texts:
            del self.texts[name]
        return self.votes.pop(user, None) is not None or bool(texts)

    def pack(self) -> bytes:
        return MsgpackSerializer.dumps([FORMAT, self.round, self.votes, self.withdrawn, self.texts])

    @classmethod
    def unpack(cls, raw: bytes | None) -> "Said":
        """What `pack` gave; nothing said where it is gone or no such thing, which ids of transcripts stand up to."""
        raw = raw or b""
        try:
            form, round_, votes, withdrawn, texts = MsgpackSerializer.loads(raw if len(raw) <= MAX_SIZE else b"")
            fits = form == FORMAT and _is_count(round_) and isinstance(withdrawn, bool)
            fits = fits and len(votes) <= MAX_USERS and all(_is_vote(*item) for item in votes.items())
            fits = fits and len(texts) <= MAX_USERS and all(_is_text(*item) for item in texts.items())
        except (ValueError, TypeError, AttributeError):
            fits = False
        if not fits:
            return cls()
        return cls(round_, dict(votes), withdrawn, {name: (count, last) for name, (count, last) in texts.items()})


def _make_room(held: dict[str, Any], name: str, kind: str) -> None:
    if name not in held and len(held) >= MAX_USERS:
        raise InvalidTranscriptError("user", f"{MAX_USERS:,} users gave a {kind} of this answer already; leave it out")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_vote(user: Any, rating: Any) -> bool:
    known = isinstance(user, str) and DIGEST.fullmatch(user) is not None
    return known and type(rating) is float and -1 <= rating <= 1 and rating != 0


def _is_text(name: Any, value: Any) -> bool:
    kind, _, user = name.partition(":")
    count, last = value
    return bool(kind.isalpha() and DIGEST.fullmatch(user) and _is_count(count) and isinstance(last, str))
