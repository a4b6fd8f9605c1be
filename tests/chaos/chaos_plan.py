"""What a campaign does, in which order, and what it trains: all of it follows from the seed alone."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from worker.utils.fault_injection import POINTS, RECOVERY_POINTS

MAX_JOBS = 4
"""Transcripts a version: small, so that there are many versions to be killed in."""
HISTORY = 60
"""Versions whose manifests Redis keeps: more than one operation makes."""
OPTIONS = (
    *("--max-jobs", str(MAX_JOBS), "--linger", "0.02", "--checkpoint-every", "16", "--outliers", "0"),
    *("--history", str(HISTORY), "--rehearse", "0.5"),
)
WORDS = ("red", "green", "blue", "one", "two", "three", "night", "day", "sun", "moon", "up", "down")


@dataclass(frozen=True)
class Kill:
    """what: worker | server | redis, or two of them with +. point: where the worker dies (on its pass number `count`;
    before a point of the recovery another dies in an update, so that there is something to recover); without one,
    `delay` seconds after the worker started ("worker") or was ready. pause: how long Redis stays away."""

    what: str
    point: str | None = None
    count: int = 1
    delay: float = 0.0
    pause: float = 0.0

    def __str__(self) -> str:
        return f"{self.what} at {self.point}:{self.count}" if self.point else f"{self.what} after {self.delay:.2f} s"


@dataclass(frozen=True)
class Rollback:
    """`tandem rollback` to `back` versions ago, without `drop` of the transcripts of the last versions; the others are
    queued again, if `requeue`. point: where it is killed, for the next start of a worker to finish it."""

    back: int
    drop: int
    requeue: bool
    point: str | None
    dice: int
    """Which transcripts are dropped."""

    def __str__(self) -> str:
        killed = f", killed at {self.point}" if self.point else ""
        return f"rollback by {self.back} without {self.drop}{' --requeue' if self.requeue else ''}{killed}"


@dataclass(frozen=True)
class CanaryFails:
    """A worker whose canary set fails, which goes back by itself. point: where it is killed on the way."""

    point: str | None

    def __str__(self) -> str:
        return f"the canary fails{f', killed at {self.point}' if self.point else ''}"


Operation = Kill | Rollback | CanaryFails


def operations(seed: int, kills: int) -> list[Operation]:
    """The kills of `plan`, in their order, with rollbacks and failing canaries in between: one for five of them."""
    dice = random.Random(f"{seed}/operations")
    points = ["journaled", None, "restoring", None, "restored", None]
    between: list[Operation] = []
    for i in range(max(3, kills // 7)):
        drop = dice.choice((0, 1, 1, 2))
        between.append(Rollback(dice.randint(1, 6), drop, dice.random() < 0.5, points[i % 6], dice.randrange(2**31)))
    between += [CanaryFails((None, "restored", None, "restoring")[i % 4]) for i in range(max(1, kills // 25))]
    dice.shuffle(between)
    planned: list[Operation] = list(plan(seed, kills))
    places = sorted(dice.sample(range(1, kills + 1), min(len(between), kills)) if kills else [], reverse=True)
    for place, operation in zip(places, between, strict=False):
        planned.insert(place, operation)
    return planned


def plan(seed: int, kills: int) -> list[Kill]:
    """Which kills, in which order: seven in ten at the named points, each of these equally often."""
    dice = random.Random(seed)
    timed = ["worker", "server", "redis", "worker", "redis+worker", "worker", "server+worker"]
    at_points = [POINTS[i % len(POINTS)] for i in range(kills * 7 // 10)]
    planned = []
    for i, point in enumerate(at_points):
        what = "worker+server" if i // len(POINTS) % 4 == 3 else "worker"
        count = 1 if point in RECOVERY_POINTS else dice.choice((1, 1, 2, 3))
        planned.append(Kill(what, point, count))
    for i in range(kills - len(planned)):
        planned.append(Kill(timed[i % len(timed)], delay=dice.uniform(0, 1.5), pause=dice.uniform(0, 0.6)))
    dice.shuffle(planned)
    return planned


def conversation(index: int) -> dict[str, Any]:
    """Demonstration `index`: one to three turns whose words follow from the index."""
    dice = random.Random(index)
    turns = [_message(dice, role) for _ in range(dice.randint(1, 3)) for role in ("user", "assistant")]
    return {"id": f"t{index}", "messages": turns, "weight": dice.choice((1.0, 1.0, 0.5))}


def transcript(index: int) -> dict[str, Any]:
    """`conversation(index)`; half of them were rated or corrected."""
    dice = random.Random(f"feedback/{index}")
    said = (
        {},
        {},
        {},
        {"rating": 1},
        {"rating": -1},
        {"rejected": _message(dice, "assistant")},
        {"comment": "shorter"},
        {"method": "distill"},
    )
    return conversation(index) | dice.choice(said)


def _message(dice: random.Random, role: str) -> dict[str, str]:
    return {"role": role, "content": " ".join(dice.choices(WORDS, k=dice.randint(2, 12)))}


def by_kind(planned: Sequence[Operation]) -> Iterator[tuple[str, int]]:
    """(kind, how many), for the report."""

    def kind(one: Operation) -> str:
        if isinstance(one, Kill):
            return f"{one.what} at {one.point}" if one.point else one.what
        name = "rollback" if isinstance(one, Rollback) else "canary fails"
        return f"{name}, killed at {one.point}" if one.point else name

    yield from sorted(Counter(map(kind, planned)).items())
