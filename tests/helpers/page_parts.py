"""Versions and jobs as a worker leaves them in Redis, and hostile ones, for the tests of the page."""

import json
import math
import time
from typing import Any

import redis

from producer import keys
from worker.config.version_record import VersionRecord
from worker.versions import ledger, pause_switch

LINEAGE = "a" * 32
SCRIPT = '<script>alert("1")</script><img src=x onerror=alert(2)>'
KINDS = ("demonstration", "liked", "correction", "disliked", "comment", "distilled")


def at(seconds: float) -> str:
    """ISO 8601 in UTC, as `ledger.utc` writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".000Z"


def manifest(version: int, of: int, now: float) -> dict[str, Any]:
    """A plausible one: losses fall, pauses are short."""
    loss = 0.6 + 2.2 * math.exp(-3 * version / of) + 0.12 * math.sin(2.3 * version)
    kinds = {
        kind: {"jobs": 1 + version % 3, "loss": loss * (1 + 0.15 * i)}
        for i, kind in enumerate(KINDS[: 1 + version % 4])
    }
    found: dict[str, Any] = {
        "kind": "update", "way": "burst", "optimizer": "apollo-mini", "at": at(now - 40 * (of - version)),
        "tokens": 900 + 37 * (version % 11), "trained_tokens": 320 + 11 * (version % 7), "loss": loss,
        "update_ratio": 1e-4 * (1 + 0.3 * math.cos(version)), "pause_s": 0.02 + 0.004 * (version % 5),
        "step_s": 1.1 + 0.2 * math.sin(version), "serving_cost_s": 0.25 + 0.1 * (version % 4), "running_requests": 3,
    }  # fmt: skip
    return found | ({"kinds": kinds} if version % 4 else {})


def plant(connection: redis.Redis, count: int, *, rollback: int | None = None) -> None:
    """Versions 1 to `count`, a canary's look at every tenth, a pause in the middle; the version `rollback` is one."""
    now = time.time()
    for version in range(1, count + 1):
        said = manifest(version, count, now)
        jobs = [f"chat-{version}-{i}" for i in range(1 + version % 4)]
        if version == rollback:
            jobs = []
            said = {"kind": "rollback", "at": said["at"], "target": version - 5, "tokens": 0, "dropped": ["chat-2-0"]}
            said |= {"abandoned": list(range(version - 4, version)), "requeued": [], "retaken": [], "reason": "worse"}
        ledger.write(VersionRecord(version, LINEAGE, jobs, said), connection=connection)
        if version % 10 == 0:
            passed = version % 40 != 0
            entry = {
                "version": version,
                "loss": 1.3 - 0.2 * version / count + (0 if passed else 0.4),
                "passed": int(passed),
            }
            with connection.pipeline() as pipe:
                pause_switch.announce(pipe, "canary", entry)
                pipe.execute()
    if count > 3:
        pause_switch.pause(connection, "the canary set's loss at version 40 is 1.5, above 1.4")
        pause_switch.resume(connection)


HOSTILE: list[dict[str, Any]] = [
    {name: SCRIPT for name in ("kind", "at", "way", "optimizer", "reason", "loss", "tokens", "target", "update_ratio")},
    {"kind": "update", "loss": "nan", "tokens": "inf", "step_s": "-inf", "pause_s": "1e308", "update_ratio": "1e-320"},
    {"kind": "rollback", "target": "9" * 5000, "at": "9999-12-31T23:59:59Z", "dropped": json.dumps([SCRIPT, 1, None])},
    {"kind": "rollback", "target": "-5", "at": "0001-01-01", "loss": "1e999", "jobs": json.dumps({"a": 1})},
    {"kind": "update", "jobs": json.dumps([SCRIPT, "../../etc", "a b", "x" * 5000]), "kinds": json.dumps({SCRIPT: 1})},
    {"kind": "update", "kinds": json.dumps({SCRIPT: {"jobs": 10**30, "loss": 1e300}, "liked": {"jobs": True}})},
    {"kind": "update", "kinds": "[" * 3000, "jobs": "[" * 3000, "serving_cost_s": "nan", "step_s": "0", "tokens": "1"},
    {"kind": "update", "jobs": json.dumps(["y" * 30] * 10_000), "reason": "z" * 100_000, "tokens": "0x10"},
    {b"\xff\xfe": b"\xff", "kind": b"\xff\xfe", "loss": b"\x00", "at": "2026-01-01"},
    {},
]
"""Fields of manifests that no worker writes."""


def plant_hostile(connection: redis.Redis) -> int:
    """One version of each, two with keys of another type; the newest version's number."""
    for version, fields in enumerate(HOSTILE, 1):
        if fields:
            connection.hset(keys.manifest(version), mapping=fields)  # type: ignore[arg-type]
    last = len(HOSTILE) + 2
    connection.set(keys.manifest(last - 1), SCRIPT)
    connection.rpush(keys.manifest(last), SCRIPT)
    connection.set(keys.VERSION, last)
    for entry in ({"kind": SCRIPT, "reason": SCRIPT}, {"kind": "held", "reason": SCRIPT, "version": SCRIPT}):
        connection.xadd(keys.EVENTS, entry)  # type: ignore[arg-type]
    connection.xadd(keys.EVENTS, {"kind": "canary", "version": "3", "loss": "nan", "passed": SCRIPT})
    connection.xadd(keys.EVENTS, {"version": "9" * 400, "lineage": SCRIPT, "loss": SCRIPT})
    connection.hset(keys.STATE, mapping={"hold": SCRIPT, "lineage": SCRIPT, "at": SCRIPT, "loss": "nan", "jobs": "inf"})
    return last
