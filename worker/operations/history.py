"""The newest versions as Redis tells of them: manifests, and for older ones the events, read into plain values.

Whoever can write to Redis decides what lies there, so every value is checked, cut and counted; what is of another kind
than it should be is left out, never raised.
Must not know: torch, vLLM, RQ.
Invariants: reads only, two round trips, at most `MOST` versions; a text of more than `MAX_TEXT` bytes is not fetched.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis

from producer import keys
from worker.operations import canary_losses
from worker.versions import ledger

MOST = 300
"""Versions that are read at once, at most."""
EVENTS_A_VERSION = 3
"""Entries of the event stream that are read for each version: its own, a canary's, a pause."""
MAX_TEXT = 64 * 1024
"""Bytes of one field of a manifest; longer ones are left out."""
MAX_IDS = 1000
"""Ids of one list."""
MAX_KINDS = 12
MAX_WORD = 300
"""Characters of a word or a sentence."""

NUMBERS = (
    *("tokens", "trained_tokens", "loss", "update_ratio", "pause_s", "step_s", "linger_s", "tokenize_s", "commit_s"),
    *("serving_cost_s", "running_requests", "gradients_s", "target", "base", "dislikes_moved"),
)
WORDS = ("kind", "at", "way", "optimizer", "reason", "lineage")
LISTS = ("jobs", "dropped", "abandoned", "requeued", "retaken", "rehearsed")
LONG = (*LISTS, "kinds", "reason")
"""Fields whose length is asked first."""


@dataclass(frozen=True)
class KindLoss:
    """Of one kind of feedback in a version: how many jobs, and their mean loss in nats a trained token."""

    jobs: int
    loss: float


@dataclass(frozen=True)
class Version:
    """What Redis has of one version. numbers: finite or not, as they were written; at: seconds since 1970, in UTC.

    whole: whether its manifest is there; of an older one only the event's headline is."""

    number: int
    whole: bool = True
    at: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Mapping[str, KindLoss] = field(default_factory=dict)
    job_count: int | None = None

    @property
    def kind(self) -> str:
        return self.words.get("kind", "?")

    @property
    def target(self) -> int | None:
        """Of a rollback: the version that it is again."""
        value = self.numbers.get("target")
        return int(value) if value is not None and 0 <= value < 2**53 else None

    @property
    def tokens_per_second(self) -> float | None:
        tokens, seconds = self.numbers.get("tokens"), self.numbers.get("step_s")
        return tokens / seconds if tokens and seconds and seconds > 0 else None


@dataclass(frozen=True)
class Happening:
    """An event that is about no new version. kind: canary | held | resumed | another's word.

    Of a canary: losses: of each set by name; failed: the sets beyond their bounds, where the worker says which."""

    kind: str
    at: float
    version: int | None = None
    loss: float | None = None
    passed: bool = True
    reason: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class History:
    """versions and happenings, newest first; newest: the live version's number; gone: versions that a rollback took out
    of the weights, one of these or one of the `MOST` after them."""

    newest: int = 0
    versions: tuple[Version, ...] = ()
    happenings: tuple[Happening, ...] = ()
    gone: frozenset[int] = frozenset()


def read(connection: redis.Redis, count: int = 60, newest: int | None = None) -> History:
    """The `count` versions up to `newest` (None: the live one), and what happened beside them.

    Raises redis errors, and `LedgerMismatchError` where the version is no number."""
    live = ledger.state(connection).version
    last = live if newest is None else max(0, min(newest, live))
    wanted = list(range(last, max(0, last - min(count, MOST)), -1))
    with connection.pipeline(transaction=False) as pipe:
        for version in wanted:
            for name in LONG:
                pipe.hstrlen(keys.manifest(version), name)
        pipe.xrevrange(keys.EVENTS, count=EVENTS_A_VERSION * (min(live - last, MOST) + len(wanted)) or 1)
        later = range(min(live, last + MOST), last, -1)
        for version in later:
            pipe.hmget(keys.manifest(version), "kind", "target")
        answers = pipe.execute(raise_on_error=False)
    lengths = answers[: len(wanted) * len(LONG)]
    entries, *newer = answers[len(lengths) :]
    events = [] if isinstance(entries, Exception) else entries
    manifests = _manifests(connection, wanted, lengths)
    headlines = _headlines(events)
    found = []
    for version in wanted:
        raw = manifests[version]
        if raw or version in headlines:
            found.append(version_of(version, raw or headlines[version], whole=bool(raw)))
    heads = [(v, raw) for v, raw in zip(later, newer, strict=True) if not isinstance(raw, Exception)]
    after = [version_of(v, {"kind": raw[0] or b"", "target": raw[1] or b""}, whole=True) for v, raw in heads]
    back = [(one.number, one.target) for one in [*after, *found] if one.kind == "rollback"]
    return History(live, tuple(found), tuple(_happenings(events)), frozenset(rolled_back(back)))


def _manifests(connection: redis.Redis, wanted: list[int], lengths: list[Any]) -> dict[int, dict[str, bytes]]:
    """Version -> its fields, without those that are too long."""
    asked: dict[int, list[str]] = {}
    with connection.pipeline(transaction=False) as pipe:
        for place, version in enumerate(wanted):
            known = lengths[place * len(LONG) : (place + 1) * len(LONG)]
            fits = [n for n, length in zip(LONG, known, strict=True) if isinstance(length, int) and length <= MAX_TEXT]
            asked[version] = list(dict.fromkeys([*NUMBERS, *(w for w in WORDS if w != "reason"), *fits]))
            pipe.hmget(keys.manifest(version), asked[version])
        answers = pipe.execute(raise_on_error=False)
    found = {}
    for version, values in zip(wanted, answers, strict=True):
        values = [] if isinstance(values, Exception) else values
        found[version] = {n: v for n, v in zip(asked[version], values, strict=False) if v is not None}
    return found


def _headlines(events: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> dict[int, dict[str, bytes]]:
    """Version -> the fields of its own event, for versions whose manifest is trimmed."""
    found: dict[int, dict[str, bytes]] = {}
    for _, fields in events:
        number = _whole(_text(fields.get(b"version")))
        if number is not None and b"lineage" in fields:
            found.setdefault(number, {_text(name): value for name, value in fields.items()})
    return found


def _happenings(events: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> Iterable[Happening]:
    for entry_id, fields in events:
        if b"lineage" in fields:
            continue
        said = {_text(name): _text(value)[:MAX_WORD] for name, value in fields.items()}
        at = as_number(_text(entry_id).partition("-")[0])
        long = {n: _text(fields[n]) for n in (b"losses", b"failed") if len(fields.get(n, b"")) in range(1, MAX_TEXT)}
        losses = canary_losses.read(long.get(b"losses"), said.get("loss"))
        passed = said.get("passed") != "0"
        failed = frozenset(_ids(long.get(b"failed", "")) or ()) & losses.keys()
        yield Happening(
            kind=said.get("kind", "?"),
            at=(at or 0.0) / 1000,
            version=_whole(said.get("version", "")),
            loss=as_number(said.get("loss", "")),
            passed=passed,
            reason=said.get("reason", ""),
            losses=losses,
            failed=frozenset(losses) if not passed and len(losses) == 1 else failed,
        )


def version_of(number: int, raw: Mapping[str, bytes], *, whole: bool) -> Version:
    """A version from the fields of its manifest, or of its event, whatever they hold."""
    text = {name: _text(value) for name, value in raw.items()}
    numbers = {n: value for n in NUMBERS if n in text and (value := as_number(text[n])) is not None}
    lists = {n: found for n in LISTS if n in text and (found := _ids(text[n])) is not None}
    count = len(lists["jobs"]) if "jobs" in lists else _whole(text.get("jobs", ""))
    return Version(
        number,
        whole,
        at=as_time(text.get("at")),
        numbers=numbers,
        words={n: text[n][:MAX_WORD] for n in WORDS if text.get(n)},
        lists=lists,
        kinds=_kinds(text.get("kinds")),
        job_count=count,
    )


def rolled_back(rollbacks: Iterable[tuple[int, int | None]]) -> set[int]:
    """Versions that are no longer in the weights. rollbacks: (version, target), newest first."""
    out: set[int] = set()
    for version, target in rollbacks:
        if target is not None and version not in out:
            out |= set(range(max(target + 1, version - 100_000), version))
    return out


def as_number(text: str) -> float | None:
    """A number, which may be infinite or NaN; None for anything else."""
    try:
        return float(text)
    except ValueError:
        return None


def as_time(text: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time; one without a zone is UTC."""
    try:
        found = datetime.fromisoformat(text) if text else None
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() if found else None
    except (ValueError, OverflowError):
        return None


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _whole(text: str) -> int | None:
    value = as_number(text)
    return int(value) if value is not None and 0 <= value < 2**53 else None


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def _ids(text: str) -> tuple[str, ...] | None:
    """A JSON list's texts and numbers; None for anything else."""
    found = _json(text)
    if not isinstance(found, list):
        return None
    return tuple(str(entry)[:MAX_WORD] for entry in found[:MAX_IDS] if isinstance(entry, str | int))


def _kinds(text: str | None) -> dict[str, KindLoss]:
    """{"liked": {"jobs": 2, "loss": 1.5}}, as far as it is that."""
    found, kinds = _json(text), {}
    for name, of in list(found.items())[:MAX_KINDS] if isinstance(found, dict) else []:
        jobs, loss = (of.get("jobs"), of.get("loss")) if isinstance(of, dict) else (None, None)
        if isinstance(jobs, int) and isinstance(loss, int | float) and not isinstance(jobs, bool):
            kinds[name[:40]] = KindLoss(min(jobs, 2**53), float(loss) if abs(loss) < 1e300 else math.inf)
    return kinds
