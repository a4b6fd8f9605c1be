"""What the Redis user of the URL may do, against what a worker and a producer do.

A command that is sent after MULTI is checked against the user's rights when it is queued, and runs with EXEC alone,
which is never sent: so writes can be tried, and nothing changes.

Must not know: torch, vLLM. Invariant: no command is sent after a MULTI that was refused.
"""

from collections.abc import Sequence
from typing import Any

import redis

from producer import keys
from producer.connection import own_words
from worker.operations.doctor.finding import Fact, Finding, fault, ok

WORKER_ACL = "resetchannels &rq:pubsub:* ~rq:* ~weights:* ~completion* ~feedback:* +@all -@admin -@dangerous +info"
"""What a worker's Redis user needs: `ACL SETUSER worker on >password` and this. Redis 7 or later. It reads and writes
the keys of RQ and of Tandem, and configures, lists and deletes nothing else."""

JOB, QUEUE = "rq:job:doctor", f"rq:queue:{keys.QUEUE}"
PRODUCER: tuple[tuple[str, ...], ...] = (
    ("exists", JOB),
    ("hgetall", JOB),
    ("hset", JOB, "data", ""),
    ("rpush", QUEUE, "doctor"),
    ("xrevrange", "rq:results:doctor", "+", "-"),
    ("xread", "streams", "rq:results:doctor", "0"),
    ("get", keys.VERSION),
    ("hmget", keys.LEDGER, "doctor"),
    ("hget", keys.STATE, "lineage"),
)
WORKER: tuple[tuple[str, ...], ...] = (
    ("info",),
    ("subscribe", "rq:pubsub:doctor"),
    ("script", "load", "return 0"),
    ("eval", "return 0", "2", QUEUE, JOB),
    ("evalsha", "0" * 40, "1", JOB),
    ("client", "setname", "doctor"),
    ("client", "info"),
    ("lmove", QUEUE, f"{QUEUE}:intermediate", "LEFT", "RIGHT"),
    ("lpush", QUEUE, "doctor"),
    ("lrem", QUEUE, "1", "doctor"),
    ("lrange", QUEUE, "0", "0"),
    ("llen", QUEUE),
    *(("hgetall", JOB), ("hset", JOB, "status", ""), ("hstrlen", JOB, "data"), ("hkeys", JOB), ("hlen", JOB)),
    *(("expire", JOB, "1"), ("persist", JOB), ("del", JOB), ("type", JOB), ("ttl", JOB)),
    *(("zadd", f"rq:wip:{keys.QUEUE}", "0", "doctor"), ("zrem", f"rq:finished:{keys.QUEUE}", "doctor")),
    *(("zrangebyscore", f"rq:scheduled:{keys.QUEUE}", "0", "0"), ("zcard", f"rq:failed:{keys.QUEUE}")),
    ("xadd", "rq:results:doctor", "*", "type", "1"),
    *(("sadd", "rq:workers", "doctor"), ("srem", "rq:workers", "doctor"), ("smembers", f"rq:workers:{keys.QUEUE}")),
    *(("hset", "rq:worker:doctor", "state", "idle"), ("hincrby", "rq:worker:doctor", "successful_job_count", "0")),
    *(("hset", "rq:execution:doctor", "id", ""), ("zadd", "rq:executions:doctor", "0", "doctor")),
    *(("set", keys.VERSION, "0"), ("hset", keys.LEDGER, "doctor", "0"), ("hset", keys.STATE, "lineage", "")),
    *(("hset", keys.DROPPED, "doctor", "0"), ("hset", keys.LOST, "doctor", ""), ("hset", keys.manifest(0), "at", "")),
    *(("set", keys.WORKER_LOCK, "", "NX"), ("del", keys.WORKER_LOCK)),
    ("xadd", keys.EVENTS, "*", "version", "0"),
    ("hscan", keys.LEDGER, "0"),
)
SCRIPTS = ("eval", "evalsha")
"""Their first argument is no key."""
ROLES = {"worker": WORKER, "producer": PRODUCER}
SHOWN = 4
"""How many missing rights a finding names."""


def check_rights(client: redis.Redis, role: str) -> Finding:
    """Whether the user may run every command of `role` (of ROLES). Raises redis errors."""
    refused = missing(client, ROLES[role])
    if refused:
        return fault(f"{role}'s rights", Fact.RIGHTS_MISSING, role=role, first=refused[:SHOWN], count=len(refused))
    return ok(f"{role}'s rights", Fact.RIGHTS, role=role)


def missing(client: redis.Redis, commands: Sequence[Sequence[str]]) -> list[str]:
    """Those of `commands` that the user may not run, as "hset weights:ledger". Raises redis errors."""
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:
        found = _refused(connection, [("watch", keys.VERSION)]) + _refused(connection, [("multi",)])
        if "multi" not in found:
            found += _refused(connection, commands)
        return list(dict.fromkeys(found))
    finally:
        connection.disconnect()  # which discards what was queued
        pool.release(connection)


def _refused(connection: Any, commands: Sequence[Sequence[str]]) -> list[str]:
    """Those that the user may not run, each with its key.

    They are sent as one, and without redis-py's health check: a PING after MULTI is queued, redis-py takes that for a
    dead connection, and makes another, on which what follows would run.
    """
    connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    found = []
    for command in commands:
        try:
            connection.read_response()
        except redis.exceptions.NoPermissionError:
            alone = len(command) == 1 or command[0] in SCRIPTS
            found.append(command[0] if alone else " ".join(command[:2]))
        except redis.exceptions.ResponseError as error:
            if command[0] == "multi":
                error.args = (own_words(error),)
                raise
    return found
