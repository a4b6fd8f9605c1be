"""Training paused: a switch in Redis that every worker looks at between batches, while the server goes on serving.

It lies in `weights:state` (fields `hold`, `hold_at`), survives workers and servers, and is said in `weights:events`.
Must not know: torch, RQ.
Invariants: whoever pauses says why; a pause ends only when somebody resumes; no job is lost or failed by it.
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from producer import keys
from worker.config.protocol import UnavailableError
from worker.versions import ledger

REASON, AT = "hold", "hold_at"
"""Fields of `weights:state`."""
POLL = 1.0
"""Seconds between two looks while training is paused."""


def pause(connection: redis.Redis, reason: str) -> None:
    """Pause training, from the next batch on; `reason` is one sentence for a person. A second reason replaces it."""
    at = ledger.utc()
    with connection.pipeline() as pipe:
        pipe.hset(keys.STATE, mapping={REASON: reason, AT: at})
        announce(pipe, "held", {"reason": reason, "at": at, "version": ledger.state(connection).version})
        pipe.execute()


def resume(connection: redis.Redis) -> str | None:
    """End the pause; its reason, or None when there was none."""
    found = pause_reason(connection)
    if found is not None:
        with connection.pipeline() as pipe:
            pipe.hdel(keys.STATE, REASON, AT)
            announce(pipe, "resumed", {"at": ledger.utc(), "version": ledger.state(connection).version})
            pipe.execute()
    return found


def pause_reason(connection: redis.Redis) -> str | None:
    """Why training is paused, or None."""
    found: Any = connection.hget(keys.STATE, REASON)
    return found.decode(errors="replace") if found is not None else None


def wait(
    connection: redis.Redis,
    *,
    burst: bool,
    stopping: Callable[[], bool],
    tell: Callable[[str], None],
    look: Callable[[], object] = lambda: None,
    poll: float = POLL,
) -> None:
    """Return at once unless training is paused; else when it is resumed, or `stopping()` says so. tell: for one
    sentence. look: called at every look; may raise.

    Raises `UnavailableError` with burst, because nobody may come to resume.
    """
    reason = pause_reason(connection)
    if reason is None:
        return
    sentence = f"training is paused: {reason}; `tandem resume` ends it"
    if burst:
        raise UnavailableError(sentence)
    tell(sentence)
    while not stopping():
        time.sleep(poll)
        if pause_reason(connection) is None:
            tell("training goes on")
            return
        look()


def announce(pipe: Any, kind: str, fields: dict[Any, Any]) -> None:
    """Queue an entry on `weights:events` that is not about a new version."""
    entry = {"kind": kind} | fields
    pipe.xadd(keys.EVENTS, entry, maxlen=ledger.EVENTS_KEPT, approximate=True)
