"""Jobs that somebody wrote who can only write to Redis."""

import functools
import os
import pickle
import zlib
from typing import Any

import msgpack
import redis

from producer import keys

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
CANARY = "tandem-attack-canary"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def call(function: Any = keys.FUNCTION, instance: Any = None, args: Any = None, kwargs: Any = None) -> bytes:
    return msgpack.packb([function, instance, [{"messages": GOOD}] if args is None else args, kwargs or {}])


def nested(depth: int, inner: bytes) -> bytes:
    return b"\x91" * depth + inner


@functools.cache
def bomb() -> bytes:
    """A quarter of a gigabyte, in a quarter of a megabyte."""
    return zlib.compress(bytes(2**28))


def attacks(canary: str) -> dict[str, dict[str, bytes]]:
    """Job id -> the fields of its hash."""
    callback = {"data": zlib.compress(call())}
    fields = {
        "os-system": {"data": zlib.compress(call("os.system", args=[f"touch {canary}"]))},
        "builtins": {"data": zlib.compress(call("builtins.exec", args=[f"open({canary!r}, 'w')"]))},
        "near-name": {"data": zlib.compress(call("worker.train.__init__"))},
        "no-function": {"data": zlib.compress(call(None))},
        "list-function": {"data": zlib.compress(call(["worker.train"]))},
        "instance": {"data": zlib.compress(call(instance={"a": 1}))},
        "on-success": callback | {"success_callback_name": b"os.abort"},
        "on-failure": {"data": b"\xc1"} | {"failure_callback_name": b"os.abort"},
        "on-stopped": callback | {"stopped_callback_name": b"os.abort"},
        "webhook": callback | {"webhooks": b'[{"url": "http://127.0.0.1:9/", "job_status": "failed"}]'},
        "pickle": {"data": zlib.compress(pickle.dumps(Touch(canary)))},
        "pickled-call": {"data": zlib.compress(pickle.dumps(("worker.train", None, (Touch(canary),), {})))},
        "pickled-all-over": {"data": pickle.dumps(Touch(canary)), "meta": pickle.dumps(Touch(canary))}
        | {"result": pickle.dumps(Touch(canary)), "exc_info": pickle.dumps(Touch(canary))},
        "bomb": {"data": bomb()},
        "bomb-in-bomb": {"data": zlib.compress(bomb())},
        "bomb-elsewhere": {"data": b"", "exc_info": bomb()},
        "larger-than-fetched": {"data": os.urandom(11 * 1024 * 1024)},
        "many-fields": {f"field{i}": b"x" for i in range(1000)} | {"data": zlib.compress(call())},
        "no-data": {"status": b"queued"},
        "empty": {"data": b""},
        "garbage": {"data": os.urandom(300)},
        "cut-short": {"data": zlib.compress(call())[:-9]},
        "deep": {"data": zlib.compress(nested(900, b"\xc0"))},
        "deeper": {"data": zlib.compress(nested(900_000, b"\xc0"))},
        "array-of-4-billion": {"data": zlib.compress(b"\xdd\xff\xff\xff\xff")},
        "arrays-of-a-million": {"data": zlib.compress(b"\xdd\x00\x0f\x42\x40" * 500 + b"\xc0" * 1_100_000)},
        "map-with-map-keys": {"data": zlib.compress(b"\x81\x80\xc0")},
        "time-before-time": {"data": zlib.compress(b"\xc7\x0c\xff" + b"\xff" * 12)},
        "five-parts": {"data": zlib.compress(msgpack.packb([keys.FUNCTION, None, [], {}, 1]))},
        "keywords": {"data": zlib.compress(call(kwargs={"lr": 1e9}))},
        "two-transcripts": {"data": zlib.compress(call(args=[{"messages": GOOD}, {"messages": GOOD}]))},
        "no-map": {"data": zlib.compress(call(args=["text"]))},
        "own-template": {
            "data": zlib.compress(call(args=[{"messages": GOOD, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}]))
        },
        "another-id": {"data": zlib.compress(call(args=[{"messages": GOOD, "id": "somebody-else"}]))},
        "no-number": callback | {"timeout": b"abc"},
        "no-status": callback | {"status": b"zzz"},
        "no-date": callback | {"created_at": b"yesterday"},
        "retries-no-list": callback | {"retries_left": b"2", "retry_intervals": b"5"},
        "retries-no-seconds": callback | {"retries_left": b"2", "retry_intervals": b'["x"]'},
        "retries-in-no-time": callback | {"retries_left": b"2", "retry_intervals": b"[1e300]"},
        "intervals-text": callback | {"retries_left": b"3", "retry_intervals": b'["a"]'},
        "intervals-huge": callback | {"retries_left": b"3", "retry_intervals": b"[1e300]"},
        "intervals-map": callback | {"retries_left": b"3", "retry_intervals": b"{}"},
        "intervals-many": callback | {"retries_left": b"3", "retry_intervals": str([1] * 1000).encode()},
        "slot": callback | {"rate_limit_key": b"k", "rate_limit_concurrency": b"1"},
        "repeats": callback | {"repeats_left": b"5", "repeat_intervals": b"[0]"},
    }
    return fields


SURVIVES = {
    "forever": {"result_ttl": b"-5"},
    "for-ages": {"result_ttl": b"9" * 18},
    "not-at-all": {"result_ttl": b"0"},
} | {
    "gone-at-once": {"ttl": b"-5"},
    "elsewhere": {"origin": b"another-queue"},
    "pickled-meta": {"meta": pickle.dumps(Touch(CANARY))},
    "elsewhere-no-text": {"origin": b"\xff\xfe"},
    "in-a-group": {"group_id": b"g"},
    "of-another-worker": {"worker_name": b"w"},
    "dependencies-no-json": {"dependency_ids": b"{"},
    "depends-on-5": {"dependency_ids": b"5"},
    "depends-on-map": {"dependency_ids": b'{"a": 1}'},
    "depends-on-no-text": {"dependency_ids": b'["\\ud800"]'},
    "depends-on-another": {"dependency_ids": b'["somebody-else"]'},
    "ever-again": {"retries_left": b"9" * 15, "retry_intervals": b"[0]"},
}
"""Odd, but a transcript: it trains, and nothing odd happens."""


def push(connection: redis.Redis, job_id: str | bytes, fields: dict[str, bytes] | None = None) -> None:
    if fields:
        connection.hset(f"rq:job:{job_id if isinstance(job_id, str) else job_id.decode()}", mapping=fields)
    connection.rpush(f"rq:queue:{keys.QUEUE}", job_id)
