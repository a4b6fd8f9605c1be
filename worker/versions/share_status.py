"""The worker's rest between two versions, until what they took from serving is paid, and what the last minute's took.

It lies in `weights:state`: `serving_share`, `serving_charges` and, for a rest, `rest_until`. Charges carry the second
they belong to, so that a reader at any later time sees the minute before it. Must not know: torch, RQ.
Invariants: nothing that was trained waits for it to be committed; a stop is heard within `POLL` seconds.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import redis

from producer import keys
from worker.utils.serving_budget import MINUTE, ServingBudget

UNTIL, SHARE, CHARGES = "rest_until", "serving_share", "serving_charges"
"""Fields of `weights:state`: seconds since 1970; the part of the time that serving keeps, as asked; and a JSON map from
whole seconds since 1970 to what was charged in them: the last minute's."""
FORMER = "duty_cycle"
POLL = 0.5
"""Seconds between two looks while resting."""


def start(connection: redis.Redis, budget: ServingBudget) -> None:
    """At a worker's start: what this one was asked for; what an earlier one said is no longer so."""
    with connection.pipeline() as pipe:
        pipe.hdel(keys.STATE, UNTIL, FORMER)
        pipe.hset(keys.STATE, mapping=_fields(budget))
        pipe.execute()


def rest(
    connection: redis.Redis,
    budget: ServingBudget,
    *,
    stopping: Callable[[], bool],
    look: Callable[[], object],
    poll: float = POLL,
) -> None:
    """Return once the next version may begin, or `stopping()` says so. look: called at every look; may charge more, and
    may raise."""
    said: float | None = None
    while (left := budget.left()) > 0 and not stopping():
        if said is None or left > said:
            connection.hset(keys.STATE, mapping=_fields(budget) | {UNTIL: time.time() + left})
        said = left
        time.sleep(min(left, poll))
        look()


def tell(connection: redis.Redis, budget: ServingBudget) -> None:
    """Say what the last minute's versions took."""
    connection.hset(keys.STATE, mapping=_fields(budget))


def _fields(budget: ServingBudget) -> dict[Any, Any]:
    now, by_second = time.time(), dict[int, float]()
    for ago, seconds in budget.recent():
        by_second[int(now - ago)] = by_second.get(int(now - ago), 0.0) + seconds
    rounded = {second: round(seconds, 4) for second, seconds in by_second.items()}
    return {SHARE: budget.share, CHARGES: json.dumps(rounded, separators=(",", ":"))}


def seconds_left(state: dict[str, str]) -> float:
    """How long the rest that `weights:state` tells of still lasts; 0 where there is none."""
    try:
        return max(0.0, float(state[UNTIL]) - time.time())
    except (KeyError, ValueError):
        return 0.0


def kept(state: dict[str, str]) -> float | None:
    """The part of the last minute that updates left to serving, as `weights:state` tells; None where it tells nothing
    that can be read."""
    try:
        charges = json.loads(state[CHARGES])
        taken = sum(float(seconds) for second, seconds in charges.items() if int(second) > time.time() - MINUTE)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return max(0.0, 1 - taken / MINUTE)
