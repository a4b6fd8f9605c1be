"""What kind of Redis this is: refused where Tandem cannot run on it, and its eviction policy published.

The policy goes to `weights:state` (fields `maxmemory_policy`, `maxmemory`), for producers, whose Redis user may not
ask.
Must not know: torch, RQ. Invariants: writes nothing but these two fields; what Redis will not tell is "unknown".
"""

import time
from collections.abc import Callable
from typing import Any

import redis

from producer import keys
from producer.errors import QueueUnavailableError
from producer.eviction import LIMIT, POLICY, UNKNOWN, Eviction

LOOK_SECONDS = 60.0
"""Between two looks: somebody may change the policy while the worker runs."""


def redis_info(connection: redis.Redis) -> dict[str, str]:
    """INFO, as strings; empty where our user may not ask."""
    try:
        found: dict[str, Any] = connection.info()  # type: ignore[assignment]
    except redis.exceptions.NoPermissionError:
        return {}
    return {name: str(value) for name, value in found.items()}


def check_kind(connection: redis.Redis, where: str) -> None:
    """Raise `QueueUnavailableError` where Redis is a Sentinel, a Cluster's node or a replica. where: for the error."""
    info = redis_info(connection)
    mode, role = info.get("redis_mode", info.get("server_mode", "standalone")), info.get("role", "master")
    if mode == "sentinel":
        raise QueueUnavailableError(f"Redis at {where} is a Sentinel; give the URL of the Redis that it watches")
    if mode == "cluster":
        raise QueueUnavailableError(
            f"Redis at {where} is part of a Redis Cluster, on which neither RQ nor Tandem runs; give the URL of a"
            " single Redis"
        )
    if role == "slave":
        raise QueueUnavailableError(f"Redis at {where} is a read-only replica; give the URL of its primary")


class EvictionWatch:
    """Publishes the eviction policy, and again when it changes. tell: for one sentence where it can lose something."""

    def __init__(self, connection: redis.Redis, tell: Callable[[str], None]) -> None:
        self._connection = connection
        self._tell = tell
        self._next = 0.0
        self._said: Eviction | None = None

    def look(self) -> None:
        """Ask Redis, at most every `LOOK_SECONDS`. Raises redis errors."""
        if time.monotonic() < self._next:
            return
        found = Eviction.of(redis_info(self._connection))
        publish(self._connection, found)
        if found != self._said and found.problem:
            self._tell(found.problem)
        self._said = found
        self._next = time.monotonic() + LOOK_SECONDS


def publish(connection: redis.Redis, found: Eviction) -> None:
    """Write `found` where producers read it."""
    limit = UNKNOWN if found.maxmemory is None else found.maxmemory
    connection.hset(keys.STATE, mapping={POLICY: found.policy, LIMIT: limit})
