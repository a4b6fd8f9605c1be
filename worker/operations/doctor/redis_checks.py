"""Redis: whether it answers, is new enough, evicts nothing, keeps what it is given, has keys of the right types,
answers soon, and has our time.

Must not know: torch, vLLM. Invariant: only reads.
"""

import time
from collections.abc import Mapping
from datetime import datetime

import redis

from producer import keys
from producer.connection import connect, redis_errors, safe_url
from producer.errors import TandemError
from producer.eviction import Eviction
from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked, warning
from worker.versions.eviction_watch import check_kind

SECONDS = 3.0
"""The longest that one answer may take."""
OLDEST = 7
"""Redis' major version with the rights that a producer's user needs (`producer.jobs.ACL`)."""
SLOW = 0.05
"""Seconds of a round trip: a lone transcript waits for about ten."""
NEARLY_FULL = 0.9
OFF, FAR_OFF = 2.0, 30.0
"""Seconds between two clocks: ages begin to be wrong; the signs of life of a worker (every 10 s) do."""
PINGS = 5
TYPES = {
    f"rq:queue:{keys.QUEUE}": "list",
    **{f"rq:{kind}:{keys.QUEUE}": "zset" for kind in ("wip", "finished", "failed", "deferred", "scheduled")},
    **dict.fromkeys((keys.VERSION, keys.WORKER_LOCK, keys.COMPLETION_BYTES), "string"),
    **dict.fromkeys((keys.STATE, keys.LEDGER, keys.DROPPED, keys.LOST, keys.FEEDBACK_USERS), "hash"),
    **dict.fromkeys((keys.COMPLETIONS, keys.EVALUATIONS), "zset"),
    keys.EVENTS: "stream",
}
"""What each key with a fixed name is (docs/redis.md)."""


def open_redis(url: str) -> redis.Redis:
    """An impatient client; nothing is sent yet. Raises `RedisUrlError`."""

    def make(url: str, **options: object) -> redis.Redis:
        limits = {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
        client: redis.Redis = redis.Redis.from_url(url, **options | limits)
        return client

    client: redis.Redis = connect(url, make)
    return client


def check_answers(url: str) -> tuple[Finding, redis.Redis | None]:
    """Whether the URL can be used and Redis answers at it, and a client if so."""
    where = safe_url(url)
    try:
        client = open_redis(url)
        with redis_errors(where):
            client.ping()
            check_kind(client, where)
    except TandemError as error:
        return fault("redis", Fact.REDIS_AWAY, said=str(error)), None
    return ok("redis", Fact.REDIS_ANSWERS, url=where), client


def check_version(info: Mapping[str, str]) -> Finding:
    """info: INFO's fields; empty where the user may not ask."""
    said = info.get("redis_version", "")
    if not said.partition(".")[0].isdecimal():
        return unchecked("redis version", Fact.REDIS_SILENT, command="INFO")
    name = f"Valkey {info['valkey_version']}, as Redis {said}" if "valkey_version" in info else f"Redis {said}"
    if int(said.partition(".")[0]) < OLDEST:
        return fault("redis version", Fact.REDIS_OLD, name=name, oldest=OLDEST)
    return ok("redis version", Fact.REDIS_VERSION, name=name)


def check_eviction(info: Mapping[str, str]) -> Finding:
    """What Redis does when its memory is full, and how full it is."""
    eviction = Eviction.of(info)
    if not eviction.known:
        return unchecked("eviction", Fact.REDIS_SILENT, command="INFO")
    if eviction.problem:
        return (fault if eviction.loses_jobs else warning)("eviction", Fact.EVICTS, policy=eviction.policy)
    used, limit = int(info.get("used_memory", 0)), eviction.maxmemory or 0
    if limit and used > NEARLY_FULL * limit:
        return warning("eviction", Fact.NEARLY_FULL, used=used, limit=limit)
    return ok("eviction", Fact.KEEPS_KEYS, policy=str(eviction), used=used, limit=limit)


def check_persistence(info: Mapping[str, str]) -> Finding:
    """Whether what is queued survives a restart of Redis."""
    if "aof_enabled" not in info:
        return unchecked("persistence", Fact.REDIS_SILENT, command="INFO")
    failing = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
    if failing:
        return fault("persistence", Fact.WRITES_FAIL, name=failing[0])
    if info["aof_enabled"] != "1":
        return warning("persistence", Fact.NO_APPENDONLY)
    return ok("persistence", Fact.PERSISTENT)


def check_types(client: redis.Redis) -> Finding:
    """Whether every key that is there is what Tandem or RQ keeps in it. Raises redis errors."""
    with client.pipeline(transaction=False) as pipe:
        for key in TYPES:
            pipe.type(key)
        found = [kind.decode() for kind in pipe.execute()]
    for (key, expected), kind in zip(TYPES.items(), found, strict=True):
        if kind not in ("none", expected):
            return fault("keys", Fact.KEY_TYPE_WRONG, key=key, found=kind, expected=expected)
    return ok("keys", Fact.KEY_TYPES, count=sum(kind != "none" for kind in found))


def check_latency(client: redis.Redis) -> Finding:
    """The shortest of a few round trips: what the way takes, not what else the machine does. Raises redis errors."""
    shortest = SECONDS
    for _ in range(PINGS):
        began = time.monotonic()
        client.ping()
        shortest = min(shortest, time.monotonic() - began)
    slow = shortest > SLOW
    return warning("latency", Fact.SLOW, seconds=shortest) if slow else ok("latency", Fact.QUICK, seconds=shortest)


def check_clock(client: redis.Redis) -> Finding:
    """This machine's clock against Redis', and against the time of the newest version. Raises redis errors."""
    before = time.time()
    seconds, micros = client.time()  # type: ignore[misc]
    after = time.time()
    there = seconds + micros / 1e6
    off = max(before - there, there - after, 0.0)
    if off > OFF:
        return (fault if off > FAR_OFF else warning)("clock", Fact.CLOCK_OFF, seconds=off, ahead=there < before)
    raw = client.hget(keys.STATE, "at")
    made = _seconds(raw.decode(errors="replace")) if isinstance(raw, bytes) else None
    if made is not None and made - after > FAR_OFF:
        return fault("clock", Fact.VERSION_FROM_THE_FUTURE, seconds=made - after)
    return ok("clock", Fact.CLOCK, seconds=off)


def _seconds(at: str) -> float | None:
    try:
        return datetime.fromisoformat(at).timestamp()
    except ValueError:
        return None
