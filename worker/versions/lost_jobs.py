"""Ids that the worker found on the queue without a job: Redis evicted it, or somebody deleted it.

They lie in `weights:lost` (id -> when it was found), where a producer's `status` and `wait` see them. Must not know:
RQ.
Invariants: bounded, since whoever may push on the queue chooses the ids; an id with a job, or in the ledger, is never
reported lost (readers look there first).
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice

import redis

from producer import keys
from worker.versions import ledger

KEPT = 10_000
"""Ids that are remembered. One more, and the memory begins anew."""


def record(connection: redis.Redis, ids: Sequence[str]) -> None:
    """Remember `ids` as lost, now. Those that went into a version are left out: they are not lost."""
    trained = ledger.versions(connection, ids)
    lost = [job_id for job_id in ids if job_id not in trained][:KEPT]
    if not lost:
        return
    known: int = connection.hlen(keys.LOST)  # type: ignore[assignment]
    with connection.pipeline() as pipe:
        if known + len(lost) > KEPT:
            pipe.delete(keys.LOST)
        pipe.hset(keys.LOST, mapping=dict.fromkeys(lost, ledger.utc()))
        pipe.execute()


def since(connection: redis.Redis, hours: float) -> list[str]:
    """Ids found lost within the last `hours` that are not in a version meanwhile and were not queued again."""
    raw = dict(islice(connection.hscan_iter(keys.LOST, count=1000), KEPT))  # more, no worker wrote
    first = datetime.now(UTC) - timedelta(hours=hours)
    ids = sorted(name.decode(errors="replace") for name, at in raw.items() if _later(at, first))
    trained = ledger.versions(connection, ids)
    there = _have_jobs(connection, ids)
    return [job_id for job_id, job in zip(ids, there, strict=True) if not job and job_id not in trained]


def queued_without_job(connection: redis.Redis, most: int = KEPT) -> list[str]:
    """Among the `most` ids at the front of the queue, those whose job is gone. The worker will find them lost."""
    raw: list[bytes] = connection.lrange(f"rq:queue:{keys.QUEUE}", 0, most - 1)  # type: ignore[assignment]
    ids = [name.decode(errors="replace") for name in raw]
    return [job_id for job_id, there in zip(ids, _have_jobs(connection, ids), strict=True) if not there]


def _have_jobs(connection: redis.Redis, ids: Sequence[str]) -> list[bool]:
    with connection.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.exists(f"rq:job:{job_id}")
        return [bool(there) for there in pipe.execute()]


def _later(at: bytes, first: datetime) -> bool:
    try:
        return datetime.fromisoformat(at.decode()) >= first
    except ValueError:
        return False
