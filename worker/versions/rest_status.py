"""The worker's rest between two batches, as its duty cycle asks, said in Redis while it lasts.

It lies in `weights:state` (fields `rest_until`, `duty_cycle`). Must not know: torch, RQ.
Invariants: nothing that was trained waits for it to be committed; a stop is heard within `POLL` seconds.
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from producer import keys
from worker.utils.duty_cycle import Duty

UNTIL, PART = "rest_until", "duty_cycle"
"""Fields of `weights:state`: seconds since 1970, and the part of the time that training may take."""
POLL = 0.5
"""Seconds between two looks while resting."""


def rest(
    connection: redis.Redis, duty: Duty, *, stopping: Callable[[], bool], check: Callable[[], None], poll: float = POLL
) -> None:
    """Return once no rest is owed, or `stopping()` says so. check: called at every look; may raise."""
    if duty.left() > 0 and not stopping():
        fields: dict[Any, Any] = {UNTIL: time.time() + duty.left(), PART: duty.part}
        connection.hset(keys.STATE, mapping=fields)
    while (left := duty.left()) > 0 and not stopping():
        time.sleep(min(left, poll))
        check()


def forget_rest(connection: redis.Redis) -> None:
    """At a worker's start: what an earlier one said is no longer so."""
    connection.hdel(keys.STATE, UNTIL, PART)


def seconds_left(state: dict[str, str]) -> float:
    """How long the rest that `weights:state` tells of still lasts; 0 where there is none."""
    try:
        return max(0.0, float(state[UNTIL]) - time.time())
    except (KeyError, ValueError):
        return 0.0
