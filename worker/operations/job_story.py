"""What became of one transcript: queued, trained in which version, refused and why; and which failed last.

Must not know: torch, vLLM.
Invariants: no text of the transcript is in a story, nor its meta; a job too large to read is not fetched.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import redis

from producer import keys
from producer.exchange import run, status
from producer.outcomes import State
from producer.transcript import ID_PATTERN, MAX_ID
from worker.consumer.jobs import FeedbackJob, FeedbackQueue, open_queue
from worker.consumer.transitions import fetch

COUNTS = ("turns", "tokens", "trained_tokens", "teacher_tokens", "dropped_turns")
"""Of what a job's result has (`JobResult.as_map`): what is shown of it."""
MAX_REASON = 500
MAX_DIGITS = 16
"""Of a version."""


@dataclass(frozen=True)
class Story:
    """Of one id. state: where it is (`producer.outcomes.State`); version: the one that contains it; without: the one
    that was made without it; loss: before its update, in nats a trained token, where its result is still kept; times:
    what happened -> when, oldest first; retries: how many are left."""

    id: str
    state: State
    version: int | None = None
    without: int | None = None
    loss: float | None = None
    kind: str | None = None
    reason: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    times: tuple[tuple[str, datetime], ...] = ()
    retries: int | None = None
    job: bool = False
    """Whether its job is still in Redis."""


@dataclass(frozen=True)
class Failed:
    """A failed job: its id, and the last line of why."""

    id: str
    reason: str | None


def is_id(text: str) -> bool:
    """Whether `text` can be a transcript's id."""
    return len(text) <= MAX_ID and ID_PATTERN.fullmatch(text) is not None


def story(connection: redis.Redis, job_id: str) -> Story:
    """Of `job_id`, which `is_id`. Raises redis errors, and `TandemError` where the ledger holds no version of it."""
    where, _ = run(status(connection, job_id))
    without: Any = connection.hget(keys.DROPPED, job_id)
    (job,) = fetch(open_queue(connection), [job_id])
    told = _told(job) if job is not None else {}
    dropped = int(without) if without is not None and without.isdigit() and len(without) < MAX_DIGITS else None
    return Story(job_id, where.state, where.version, dropped, reason=where.reason, **told)


def _told(job: FeedbackJob) -> dict[str, Any]:
    """What the job itself says, as far as it is of the right kind."""
    times = (("queued", job.enqueued_at or job.created_at), ("started", job.started_at), ("ended", job.ended_at))
    result = _quietly(job.return_value)
    result = result if isinstance(result, dict) else {}
    loss, kind = result.get("loss"), result.get("kind", "demonstration" if "turns" in result else None)
    return {
        "job": True,
        "retries": job.retries_left,
        "times": tuple((what, at) for what, at in times if isinstance(at, datetime) and not job.defect),
        "loss": float(loss) if isinstance(loss, int | float) and abs(loss) < 1e300 else None,
        "kind": kind[:40] if isinstance(kind, str) else None,
        "counts": {n: result[n] for n in COUNTS if isinstance(result.get(n), int) and abs(result[n]) < 2**53},
    }


def _quietly(read: Callable[[], Any]) -> Any:
    """RQ checks nothing of what it reads of a result: whatever lies there, a story is no crash. Redis' own errors are
    raised."""
    try:
        return read()
    except redis.RedisError:
        raise
    except Exception:
        return None


def failed(connection: redis.Redis, count: int = 20) -> tuple[int, list[Failed]]:
    """How many jobs have failed, and the `count` that failed last. Raises redis errors."""
    registry = open_queue(connection).failed_job_registry
    total: Any = connection.zcard(registry.key)
    ids: Any = connection.zrevrange(registry.key, 0, count - 1)
    known = [text for id in ids if is_id(text := id.decode(errors="replace"))]
    return int(total), [Failed(id, (run(status(connection, id))[0].reason or "")[:MAX_REASON]) for id in known]


def waiting(connection: redis.Redis, count: int = 20) -> list[str]:
    """The ids that are next in the queue, at most `count`. Raises redis errors."""
    ids: Any = connection.lrange(open_queue(connection).key, 0, count - 1)
    return [text for id in ids if is_id(text := id.decode(errors="replace"))]


def requeue(connection: redis.Redis, job_id: str) -> bool:
    """Queue a failed job again; False where it has not failed, or is gone. Raises redis errors."""
    queue: FeedbackQueue = open_queue(connection)
    (job,) = fetch(queue, [job_id]) if is_id(job_id) else (None,)
    if job is None or connection.zscore(queue.failed_job_registry.key, job_id) is None:
        return False
    job.requeue()
    return True
