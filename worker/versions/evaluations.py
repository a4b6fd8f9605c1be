"""What evaluations of named sets found, by version: in Redis, for comparisons, the page and the metrics.

    weights:evaluations               sorted set: name -> when it was last evaluated, in seconds since 1970
    weights:evaluation:NAME           hash: "version:lineage" -> JSON of an `Evaluation`
    weights:evaluation-scores:NAME    hash: "version:lineage" -> JSON of its scores, one list a conversation

Must not know: torch, RQ.
Invariants: figures alone, never text; a figure is of one version of one lineage; of a set the `VERSIONS` latest
evaluations are kept, and of all sets the `SETS` latest. What was not written here, or by a later format, counts as not
there.
"""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import redis

from producer import keys
from producer.errors import TandemError
from worker.versions import ledger

FORMAT = 1
SETS = 20
VERSIONS = 100
"""Evaluations of one set."""
SCORES = 1000
"""Conversations of a set whose scores are kept one by one; larger sets have their figures alone."""
MANY = 10 * VERSIONS
"""Fields of a set's hash that are read at all: more were not written here."""
MOST = 2**53
"""Above any count or version, and what a float holds exactly."""
DIGITS = 6

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Where = Literal["live", "offline"]
"""Asked of the server, or computed from checkpoint and journal: these differ in the last digits."""


class EvaluationError(TandemError):
    """What was asked of an evaluation makes no sense; the message says what to do."""


def checked_name(name: str) -> str:
    """`name`, if a set may be called so. Raises `EvaluationError`."""
    if not _NAME.fullmatch(name) or name in (".", ".."):  # answers are kept in a folder of this name
        raise EvaluationError(f"{name[:70]!r} cannot be the name of a set: use 1 to 64 of A-Z a-z 0-9 _ . -")
    return name


@dataclass(frozen=True)
class Score:
    """One conversation at one version.

    nll: negative log-likelihood of its trained tokens, in nats, summed; tokens: how many they are. exact: whether the
    greedy answer is the reference; None if nobody asked. margin: of a preference pair, by how much the chosen answer is
    likelier than the rejected one, in nats a token (each answer's log-probability over its own length); else None.
    """

    nll: float
    tokens: int
    exact: bool | None = None
    margin: float | None = None

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens

    @property
    def won(self) -> bool | None:
        """Whether the chosen answer is the likelier one; None for what is no pair."""
        return None if self.margin is None else self.margin > 0


@dataclass(frozen=True)
class Evaluation:
    """A set at a version. loss: nats a trained token over the whole set. digest: of the tokens that were scored: two
    evaluations of one digest are of the same conversations. exact of `asked` greedy answers were the reference; of
    `pairs` preference pairs `won` had the chosen answer likelier by token."""

    name: str
    version: int
    lineage: str
    digest: str
    at: str
    where: Where
    conversations: int
    tokens: int
    loss: float
    asked: int
    exact: int
    pairs: int
    won: int

    @property
    def exact_match(self) -> float | None:
        """From 0 to 1; None if no answer was asked for."""
        return self.exact / self.asked if self.asked else None

    @property
    def win_rate(self) -> float | None:
        """From 0 to 1; None for a set without pairs."""
        return self.won / self.pairs if self.pairs else None

    @property
    def of(self) -> str:
        """Its field in the set's hash."""
        return _field(self.version, self.lineage)

    def plain(self) -> dict[str, Any]:
        """For JSON, rates included."""
        return asdict(self) | {"exact_match": self.exact_match, "win_rate": self.win_rate}


def evaluation(name: str, version: int, lineage: str, digest: str, scores: Sequence[Score], where: Where) -> Evaluation:
    """What `scores`, one a conversation, amount to. Raises `EvaluationError`, also for a loss that is not finite."""
    if not scores:
        raise EvaluationError(f"the set {name} holds no conversations")
    if not math.isfinite(nll := math.fsum(score.nll for score in scores)):
        raise EvaluationError(
            f"the loss of the set {name} at version {version} is not finite: the weights are of no use; go back to an"
            " earlier version (tandem rollback)"
        )
    exact = [score.exact for score in scores if score.exact is not None]
    won = [score.won for score in scores if score.won is not None]
    tokens = sum(score.tokens for score in scores)
    return Evaluation(
        name=checked_name(name),
        version=version,
        lineage=lineage,
        digest=digest,
        at=ledger.utc(),
        where=where,
        conversations=len(scores),
        tokens=tokens,
        loss=nll / tokens,
        asked=len(exact),
        exact=sum(exact),
        pairs=len(won),
        won=sum(won),
    )


def keep(connection: redis.Redis, found: Evaluation, scores: Sequence[Score] = ()) -> None:
    """Store `found`, in the place of an earlier one of the same version, and its scores if they are not too many.

    Raises redis errors.
    """
    name, now = found.name, time.time()
    headlines, each = keys.evaluation(name), keys.evaluation_scores(name)
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(headlines, keys.EVALUATIONS)
                foreign = not _readable(connection, headlines)
                old = _oldest(_hash(connection, headlines), found.of)
                others = [one for one in _sets(connection) if _text(one) != name]
                pipe.multi()
                if foreign:
                    pipe.unlink(headlines, each)
                pipe.hset(headlines, found.of, json.dumps({"format": FORMAT} | asdict(found)))
                if len(scores) <= SCORES:
                    pipe.hset(each, found.of, json.dumps([_plain(one) for one in scores], separators=(",", ":")))
                else:
                    pipe.hdel(each, found.of)
                if old:
                    pipe.hdel(headlines, *old)
                    pipe.hdel(each, *old)
                pipe.zadd(keys.EVALUATIONS, {name: now})
                for gone in others[: max(0, len(others) + 1 - SETS)]:
                    pipe.unlink(keys.evaluation(_text(gone)), keys.evaluation_scores(_text(gone)))
                    pipe.zrem(keys.EVALUATIONS, gone)
                pipe.execute()
                return
            except redis.WatchError:
                continue


def find(connection: redis.Redis, name: str, version: int, lineage: str) -> Evaluation | None:
    """The stored evaluation of the set `name` at `version` of `lineage`."""
    raw: Any = connection.hget(keys.evaluation(name), _field(version, lineage))
    return _read(_field(version, lineage), raw, name)


def scores(connection: redis.Redis, found: Evaluation) -> list[Score] | None:
    """The scores that belong to `found`, in the set's order; None where there are none (too many, or not of ours)."""
    raw: Any = connection.hget(keys.evaluation_scores(found.name), found.of)
    try:
        each = [Score(float(nll), int(tokens), exact, margin) for nll, tokens, exact, margin in json.loads(raw or "[]")]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return each if len(each) == found.conversations else None


def of_set(connection: redis.Redis, name: str) -> list[Evaluation]:
    """All stored evaluations of the set `name`, the earliest version first; of one version, by when they were made."""
    raw = _hash(connection, keys.evaluation(name))
    found = [one for field, value in raw.items() if (one := _read(field, value, name)) is not None]
    return sorted(found, key=lambda one: (one.version, one.at))


def names(connection: redis.Redis) -> list[str]:
    """Names of the `SETS` sets that were evaluated last, sorted."""
    newest: Any = connection.zrevrange(keys.EVALUATIONS, 0, SETS - 1)
    return sorted(name for one in newest if _NAME.fullmatch(name := _text(one)))


def latest(connection: redis.Redis, lineage: str | None = None) -> list[Evaluation]:
    """Of each set the evaluation of the newest version (of `lineage`, if given), by name: for a page and metrics."""
    newest = {}
    for name in names(connection):
        for one in of_set(connection, name):
            if lineage in (None, one.lineage):
                newest[name] = one
    return list(newest.values())


def _hash(connection: redis.Redis, key: str) -> dict[bytes, bytes]:
    raw: Any = connection.hgetall(key) if _readable(connection, key) else {}
    return raw  # type: ignore[no-any-return]


def _readable(connection: redis.Redis, key: str) -> bool:
    """Whether the hash has no more fields than we would ever write there."""
    count: Any = connection.hlen(key)
    return int(count) <= MANY


def _sets(connection: redis.Redis) -> list[bytes]:
    """The names as they are stored, the one that was evaluated first first."""
    raw: Any = connection.zrange(keys.EVALUATIONS, 0, -1)
    return raw  # type: ignore[no-any-return]


def _oldest(raw: dict[bytes, bytes], new: str) -> list[bytes]:
    """The fields that must go so that `new` may come: what is not ours first, then what was evaluated first."""
    others = {
        field: one.at if (one := _read(field, value)) else "" for field, value in raw.items() if _text(field) != new
    }
    return sorted(others, key=others.__getitem__)[: max(0, len(others) + 1 - VERSIONS)]


def _field(version: int, lineage: str) -> str:
    return f"{version}:{lineage}"


def _read(field: bytes | str, raw: Any, name: str | None = None) -> Evaluation | None:
    """One stored evaluation, of the set `name` if given; None for what is not of this form."""
    try:
        stored = json.loads(raw)
        found = Evaluation(**{one.name: stored[one.name] for one in fields(Evaluation)})
        sound = stored["format"] == FORMAT and abs(found.loss) <= sys.float_info.max
        sound = sound and all(type(count := getattr(found, one)) is int and 0 <= count < MOST for one in _COUNTS)
        sound = sound and all(type(getattr(found, one)) is str for one in _WORDS) and name in (None, found.name)
        return found if sound and found.of == _text(field) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


_COUNTS = ("version", "conversations", "tokens", "asked", "exact", "pairs", "won")
_WORDS = ("name", "lineage", "digest", "at", "where")


def _plain(score: Score) -> list[Any]:
    margin = None if score.margin is None else round(score.margin, DIGITS)
    return [round(score.nll, DIGITS), score.tokens, score.exact, margin]


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode(errors="replace")
