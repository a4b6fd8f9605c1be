"""Training on hold: a switch in Redis that every worker looks at between batches, while the server goes on serving.

It lies in `weights:state` (fields `hold`, `hold_at`), survives workers and servers, and is said in `weights:events`.
Must not know: torch, RQ, why training is held.
Invariants: whoever holds says why; a hold ends only when somebody resumes; no job is lost or failed by it.
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from producer import keys
from worker.config.protocol import Unavailable
from worker.versions import ledger

REASON, AT = "hold", "hold_at"
"""Fields of `weights:state`."""
POLL = 1.0
"""Seconds between two looks while training is held."""


def hold(connection: redis.Redis, reason: str) -> None:
    """Hold training, from the next batch on; `reason` is one sentence for a person. A second reason replaces it."""
    at = ledger.utc()
    with connection.pipeline() as pipe:
        pipe.hset(keys.STATE, mapping={REASON: reason, AT: at})
        announce(pipe, "held", {"reason": reason, "at": at, "version": ledger.state(connection).version})
        pipe.execute()


def resume(connection: redis.Redis) -> str | None:
    """End the hold; its reason, or None when there was none."""
    found = held(connection)
    if found is not None:
        with connection.pipeline() as pipe:
            pipe.hdel(keys.STATE, REASON, AT)
            announce(pipe, "resumed", {"at": ledger.utc(), "version": ledger.state(connection).version})
            pipe.execute()
    return found


def held(connection: redis.Redis) -> str | None:
    """Why training is held, or None."""
    found: Any = connection.hget(keys.STATE, REASON)
    return found.decode(errors="replace") if found is not None else None


def wait(
    connection: redis.Redis,
    *,
    burst: bool,
    stopping: Callable[[], bool],
    tell: Callable[[str], None],
    poll: float = POLL,
) -> None:
    """Return at once unless training is held; else when it is resumed, or `stopping()` says so. tell: for one sentence.

    Raises `Unavailable` with burst, because nobody may come to resume.
    """
    reason = held(connection)
    if reason is None:
        return
    sentence = f"training is on hold: {reason}; `tandem resume` ends it"
    if burst:
        raise Unavailable(sentence)
    tell(sentence)
    while not stopping():
        time.sleep(poll)
        if held(connection) is None:
            tell("training goes on")
            return


def announce(pipe: Any, kind: str, fields: dict[Any, Any]) -> None:
    """Queue an entry on `weights:events` that is not about a new version."""
    entry = {"kind": kind} | fields
    pipe.xadd(keys.EVENTS, entry, maxlen=ledger.EVENTS_KEPT, approximate=True)
