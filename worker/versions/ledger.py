"""The ledger: one MULTI/EXEC that says a version exists, what went into it, and settles everybody who asked for it.

Must not know: torch, RQ. How jobs are settled comes in as a function that writes on a pipeline.
Invariants: `weights:version` only ever grows, and only together with its manifest, its ledger entries, its event and
its jobs' settlement; committing the same record again changes nothing; a transcript id, once in `weights:ledger`, stays
(a million ids of 36 characters take 96 MB of memory and 40 MB on disk in Redis 6.2.14, 96 bytes an id;
`benchmarks/queue_speed.py --ledger 1000000` measures it).
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.client import Pipeline

from producer import keys
from producer.errors import TandemError
from worker.config.version_record import VersionRecord

EVENTS_KEPT = 100_000
"""About how many entries the event stream keeps."""
FIRST_MANIFEST = "first_manifest"
"""Field of `weights:state`: no older version has a manifest any more."""
TRIMMED_AT_ONCE = 1000
"""Manifests that one commit deletes at most: more only where they were never trimmed before."""


class LedgerMismatchError(TandemError):
    """Redis and the weights disagree in a way that no commit may paper over."""


@dataclass(frozen=True)
class LedgerState:
    """What Redis says of the weights: version 0 and lineage None when it has never heard of any."""

    version: int
    lineage: str | None


def state(connection: redis.Redis) -> LedgerState:
    """Read version and lineage together. Raises `LedgerMismatchError` when the version is not a number."""
    with connection.pipeline() as pipe:
        pipe.get(keys.VERSION)
        pipe.hget(keys.STATE, "lineage")
        version, lineage = pipe.execute()
    return LedgerState(_version(version), lineage.decode(errors="replace") if lineage else None)


def versions(connection: redis.Redis, ids: Sequence[str]) -> dict[str, int]:
    """The version each of `ids` went into, for those that are trained."""
    found: list[Any] = connection.hmget(keys.LEDGER, list(ids)) if ids else []  # type: ignore[assignment]
    return {job_id: int(version) for job_id, version in zip(ids, found, strict=True) if version is not None}


def everyone(connection: redis.Redis) -> dict[str, int]:
    """The whole ledger: transcript id -> version."""
    return {name.decode(): int(version) for name, version in connection.hscan_iter(keys.LEDGER, count=10_000)}


def dropped(connection: redis.Redis) -> dict[str, int]:
    """Everybody who was dropped: transcript id -> the version that was made without it."""
    return {name.decode(): int(version) for name, version in connection.hscan_iter(keys.DROPPED, count=10_000)}


def commit(
    connection: redis.Redis,
    record: VersionRecord,
    settle: Callable[[Pipeline], None] = lambda pipe: None,
    watch: Iterable[str] = (),
    *,
    new_lineage: bool = False,
    history: int | None = None,
) -> bool:
    """Commit `record` as version N = `record.version`, where Redis must be at `record.base` of the same lineage.

    settle: queues whatever else belongs to the transaction; may be called again when a watched key changed.
    watch: further keys whose change starts the transaction anew. history: manifests of versions that lie further back
    are deleted; None: none are.
    Returns False when this very record is committed already (an earlier EXEC whose answer was lost).
    Raises LedgerMismatchError, or redis errors with the outcome unknown: call again with the same record.
    """
    version = record.version
    with connection.pipeline() as pipe:
        while True:
            try:
                pipe.watch(keys.VERSION, keys.STATE, *watch)
                now = state(connection)
                if now.version == version and _is_committed(connection, record):
                    return False
                _check(now, record, new_lineage)
                first = _first_manifest(connection)
                pipe.multi()
                write(record, pipeline=pipe)
                if history is not None:
                    _trim(pipe, first, version - history)
                own = len(pipe.command_stack)
                settle(pipe)
                _execute(pipe, own)
                return True
            except redis.WatchError:
                continue


def _first_manifest(connection: redis.Redis) -> int:
    raw: Any = connection.hget(keys.STATE, FIRST_MANIFEST)
    return int(raw) if raw is not None and raw.isdigit() else 1


def _trim(pipe: Pipeline, first: int, keep: int) -> None:
    """Delete the manifests from `first` up to, but not including, `keep`; as many as one commit may."""
    upto = min(keep, first + TRIMMED_AT_ONCE)
    if upto > first:
        pipe.unlink(*(keys.manifest(version) for version in range(first, upto)))
        pipe.hset(keys.STATE, FIRST_MANIFEST, upto)


def _execute(pipe: Pipeline, own: int) -> None:
    """EXEC. A command that fails inside it does not undo the others: for the ledger's `own` commands, the first ones,
    that is an error nobody can mend here; a job whose own keys are broken must not hold up a version."""
    errors = [answer for answer in pipe.execute(raise_on_error=False)[:own] if isinstance(answer, Exception)]
    if errors:
        raise LedgerMismatchError(
            f"Redis took a version only in part, since a weights:* key is of a wrong type: {errors[0]}"
        )


def write(record: VersionRecord, pipeline: Pipeline | None = None, connection: redis.Redis | None = None) -> None:
    """Version, manifest, ledger, event and state of `record`, on `pipeline` or at once on `connection`."""
    if pipeline is None:
        assert connection is not None, "write() needs a pipeline or a connection"
        with connection.pipeline() as pipe:
            write(record, pipeline=pipe)
            pipe.execute()
        return
    version, jobs = record.version, record.jobs
    manifest = write_manifest(record, pipeline)
    head: dict[Any, Any] = {name: flat(manifest[name]) for name in _HEADLINE if manifest.get(name) is not None}
    head["jobs"] = len(jobs)
    pipeline.set(keys.VERSION, version)
    if jobs:
        pipeline.hset(keys.LEDGER, mapping=dict.fromkeys(jobs, version))
    if out := manifest.get("dropped"):
        pipeline.hset(keys.DROPPED, mapping=dict.fromkeys(out, version))
    if back := manifest.get("retaken"):
        pipeline.hset(keys.LEDGER, mapping=dict.fromkeys(back, version))
    pipeline.xadd(keys.EVENTS, head, maxlen=EVENTS_KEPT, approximate=True)
    pipeline.hset(keys.STATE, mapping=head)


def write_manifest(record: VersionRecord, pipeline: Pipeline) -> dict[str, Any]:
    """Only the manifest of `record`, queued on `pipeline`; returns it."""
    manifest: dict[str, Any] = {"kind": "batch", "at": utc()} | record.manifest
    manifest |= {"version": record.version, "lineage": record.lineage, "jobs": record.jobs}
    mapping: dict[Any, Any] = {name: flat(value) for name, value in manifest.items()}
    pipeline.hset(keys.manifest(record.version), mapping=mapping)
    return manifest


_HEADLINE = (
    *("version", "lineage", "kind", "at", "loss", "tokens", "trained_tokens"),
    *("linger_s", "tokenize_s", "step_s", "pause_s", "update_rms", "weight_rms", "update_ratio"),
)
"""What the event and `weights:state` repeat of the manifest, for those who only watch."""


def introduce(connection: redis.Redis, lineage: str) -> None:
    """Tell a Redis without any version which weights it will count from now on."""
    connection.hset(keys.STATE, mapping={"lineage": lineage, "version": 0, "at": utc()})


def manifest(connection: redis.Redis, version: int) -> dict[str, str]:
    """The manifest of `version` as written; empty when there is none."""
    raw: dict[bytes, bytes] = connection.hgetall(keys.manifest(version))  # type: ignore[assignment]
    return {name.decode(): value.decode(errors="replace") for name, value in raw.items()}


def flat(value: Any) -> str | int | float:
    """A hash field: text and numbers as they are, everything else as JSON."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value, separators=(",", ":"), default=str)


def utc() -> str:
    """Now, as ISO 8601 in UTC with milliseconds."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


def _is_committed(connection: redis.Redis, record: VersionRecord) -> bool:
    there = manifest(connection, record.version)
    return there.get("lineage") == record.lineage and there.get("jobs") == flat(record.jobs)


def _check(now: LedgerState, record: VersionRecord, new_lineage: bool) -> None:
    version, lineage = record.version, record.lineage
    if now.version != record.base:
        raise LedgerMismatchError(
            f"the weights are at version {version} and Redis is at {now.version}, which should be {record.base}:"
            " Redis lost writes, or something else changed it; restore Redis, or restart the server"
            " (tandem serve ...) and run `tandem worker --new-lineage` to count on from here"
        )
    if now.lineage not in (None, lineage) and not new_lineage:
        raise LedgerMismatchError(f"Redis counts the weights of lineage {now.lineage}, the server's are {lineage}")


def _version(raw: bytes | None) -> int:
    try:
        if abs(found := int(raw or 0)) >= 2**53:  # no float, and so no metric, holds it
            raise ValueError
        return found
    except ValueError:
        raise LedgerMismatchError(f"Redis key {keys.VERSION} holds {raw[:40]!r}, not a version") from None  # type: ignore
