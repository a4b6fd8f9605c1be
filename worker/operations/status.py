"""The state of queue, weights, worker and server as plain data, and what is wrong with it in sentences.

Must not know: torch, vLLM. Changes nothing it looks at.
Invariants: what cannot be reached is said to be so, never guessed; nothing waits longer than a few seconds.
"""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
from rq.registry import DeferredJobRegistry, FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry
from rq.registry import StartedJobRegistry as Started
from rq.worker import SimpleWorker

from producer import keys
from producer.connection import connect, redis_errors, safe_url
from producer.errors import TandemError
from producer.eviction import LIMIT, POLICY, Eviction
from worker.consumer.jobs import oldest_job_s, open_queue
from worker.consumer.worker_lock import is_dead, parse_holder
from worker.distributed import waiting
from worker.distributed.rank_watch import STOPPED_SECONDS
from worker.operations import canary_losses
from worker.utils.hints import with_run_dir
from worker.utils.process_state import COMPUTES, SLEEPS, WAITS_FOR_A_DISK
from worker.versions import evaluations, ledger, lost_jobs, replica_status
from worker.versions.eviction_watch import redis_info
from worker.versions.pause_switch import REASON
from worker.versions.share_status import CHARGES, SHARE, UNTIL, kept, seconds_left

SECONDS = 5.0
"""How long Redis may take to answer."""
REGISTRIES = {"started": Started, "failed": FailedJobRegistry, "finished": FinishedJobRegistry}
REGISTRIES |= {"scheduled": ScheduledJobRegistry, "deferred": DeferredJobRegistry}
NUMBERS = ("jobs", "tokens", "trained_tokens", "loss", "linger_s", "tokenize_s", "step_s", "pause_s", "commit_s")
LOSS, LOSSES = "canary_loss", "canary_losses"
"""Fields of `weights:state` (worker/orchestrator/canary.py)."""
LOST_HOURS = 24.0
"""How long status tells of a transcript that the worker found without a job."""
BUSY = (COMPUTES, WAITS_FOR_A_DISK)
"""What a rank may do that is waited for, and all is well."""
SHOWN_IDS = 5
MOST_LOST = 100
"""Ids of lost transcripts that are told; their number is told whole."""
MAX_REASON = 500
"""Characters of why training is paused."""
MOST_BYTES = 65_536
"""Of a field of `weights:state` that is read: a worker's longest are a few thousand."""
MEMORY = ("used_memory", "maxmemory", "evicted_keys")
"""What is told of Redis' INFO."""
TOLD = (*NUMBERS, "at", "kind", LOSS, LOSSES, REASON, SHARE, CHARGES, UNTIL, POLICY, LIMIT, replica_status.FIELD)
"""Fields of `weights:state` that are read."""
RATIO, HOW = "update_ratio", ("optimizer", "way", "graphs", "ranks")
"""RMS of the last update over RMS of the weights, and how it was applied: kept in the version's manifest."""


def gather(redis_url: str, run_dir: Path, searched: int = lost_jobs.KEPT) -> dict[str, Any]:
    """Everything, as plain data: redis, queue, version, lineage, last_update, worker, server, problems.

    What Redis holds is told within bounds: of lost transcripts the number and the first ids. searched: how many ids of
    the queue are looked at for jobs that are gone.
    """
    status: dict[str, Any] = {"redis": {"url": safe_url(redis_url), "reachable": False}}
    try:
        with connect(redis_url, impatient) as connection, redis_errors(safe_url(redis_url)):
            connection.ping()
            status["redis"]["reachable"] = True
            reachable, found = status["redis"], _from_redis(connection, searched)
            status |= found | {"redis": reachable | found["redis"]}
    except (TandemError, ValueError) as error:
        status["redis"] |= {"reachable": status["redis"]["reachable"] and not _away(error), "error": str(error)}
    status["server"] = _server(run_dir)
    if waited := waiting.read(run_dir):
        status["waiting"] = [asdict(one) for one in waited]
    status["problems"] = [with_run_dir(problem, run_dir) for problem in problems(status)]
    return status


def impatient(url: str, **options: Any) -> redis.Redis:
    client: redis.Redis = redis.Redis.from_url(
        url, **options | {"socket_timeout": SECONDS, "socket_connect_timeout": SECONDS}
    )
    return client


def _away(error: Exception) -> bool:
    return isinstance(error.__cause__, redis.ConnectionError | redis.TimeoutError)


def _from_redis(connection: redis.Redis, searched: int) -> dict[str, Any]:
    queue = open_queue(connection)
    known = ledger.state(connection)
    said = _said(connection)
    queued = queue.count
    counts = {"queued": queued}
    for name, registry in REGISTRIES.items():
        counts[name] = registry(queue=queue).get_job_count(cleanup=False)
    update = {name: float(said[name]) for name in NUMBERS if name in said}
    asked: Any = connection.hmget(keys.manifest(known.version), [RATIO, *HOW])
    ratio, *rest = asked
    if ratio is not None:
        update[RATIO] = float(ratio)
    how = {name: value.decode(errors="replace") for name, value in zip(HOW, rest, strict=True) if value is not None}
    at = said.get("at") if known.version else None
    info = redis_info(connection)
    asked = Eviction.of(info)
    eviction = asked if asked.known else Eviction.of(said)
    lost = {*lost_jobs.since(connection, LOST_HOURS), *lost_jobs.queued_without_job(connection, searched)}
    return {
        "redis": {name: int(info[name]) for name in MEMORY if info.get(name, "").isdecimal()},
        "queue": counts,
        "oldest_job_s": oldest_job_s(queue) if queued else 0.0,
        "ledger": connection.hlen(keys.LEDGER),
        "version": known.version,
        "lineage": known.lineage,
        "last_update": {"at": at, "age_s": _age(at), "kind": said.get("kind"), **how, **update} if at else None,
        "worker": _resting(_worker(connection, queue), said),
        "replicas": _replicas(said),
        "canary_loss": _number(said.get(LOSS)),
        "canary": canary_losses.read(said.get(LOSSES), said.get(LOSS)),
        "evaluations": [one.plain() for one in evaluations.latest(connection, known.lineage)],
        "eviction": {"name": eviction.policy, "policy": str(eviction), "problem": eviction.problem},
        "lost": sorted(lost)[:MOST_LOST],
        "lost_count": len(lost),
        "hold": said[REASON][:MAX_REASON] if REASON in said else None,
    }


def _replicas(said: dict[str, str]) -> dict[str, Any] | None:
    """count, present (replica -> version), unequal, lost; None for a worker alone."""
    return asdict(members) if (members := replica_status.read(said)) is not None else None


def _said(connection: redis.Redis) -> dict[str, str]:
    """What `weights:state` says, of fields that a worker can have written."""
    with connection.pipeline(transaction=False) as pipe:
        for name in TOLD:
            pipe.hstrlen(keys.STATE, name)
        sizes = dict(zip(TOLD, pipe.execute(), strict=True))
    fits = [name for name, size in sizes.items() if size <= MOST_BYTES]
    values: Any = connection.hmget(keys.STATE, fits)
    said = {name: raw.decode(errors="replace") for name, raw in zip(fits, values, strict=True) if raw is not None}
    return said if REASON in fits else said | {REASON: "the reason is too long to be shown"}


def _resting(worker: dict[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """`worker`, with the share that serving is to keep and has kept, and, where it rests, for how long."""
    if worker["state"] in ("none", "dead") or (share := kept(said)) is None:
        return worker
    left = seconds_left(said)
    resting = {"state": "resting", "rest_s": left} if left and worker["state"] != "busy" else {}
    return worker | resting | {SHARE: _number(said.get(SHARE)), "serving_kept": share}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _worker(connection: redis.Redis, queue: Any) -> dict[str, Any]:
    """state: none | dead | idle | busy | suspended | started, and who it is."""
    value: Any = connection.get(keys.WORKER_LOCK)
    if value is None:
        return {"state": "none"}
    holder = parse_holder(value)
    who = {name: holder.get(name) for name in ("name", "pid", "host", "since")}
    if is_dead(holder):
        return {"state": "dead", **who}
    for worker in SimpleWorker.all(queue=queue):
        if worker.name == holder.get("name"):
            beat = worker.last_heartbeat
            silent = (datetime.now(UTC) - beat).total_seconds() if beat else None
            return {"state": worker.get_state(), "silent_s": silent, **who}
    return {"state": "starting", **who}


def _server(run_dir: Path) -> dict[str, Any]:
    """state: serving | paused | torn, or unreachable with the reason; where the weights are divided, what the header
    beside each rank's says."""
    from worker.serving.control_client import server_state
    from worker.shared_weights.weights_client import rank_headers

    try:
        found = {"run_dir": str(run_dir), **server_state(run_dir, SECONDS)}
        headers = rank_headers(run_dir, SECONDS)
        said = {f"rank {rank}": f"{one['state']} at {one['version']}" for rank, one in enumerate(headers)}
        return found | (said if len(said) > 1 else {})
    except (TandemError, OSError) as error:
        return {"run_dir": str(run_dir), "state": "unreachable", "reason": str(error)}


def _age(at: str | None) -> float | None:
    try:
        return time.time() - datetime.fromisoformat(at).timestamp() if at else None
    except ValueError:
        return None


def problems(status: dict[str, Any]) -> list[str]:
    """What keeps feedback from reaching the weights, in sentences; empty when all is well."""
    found = []
    if "error" in status["redis"]:
        found.append(str(status["redis"]["error"]))
    worker, server = status.get("worker"), status["server"]
    if problem := (status.get("eviction") or {}).get("problem"):
        found.append(problem)
    if lost := status.get("lost"):
        count, listed = status["lost_count"], "them" if status["lost_count"] == len(lost) else f"{len(lost)} of them"
        more = f" and {count - SHOWN_IDS:,} more (--json lists {listed})" if count > SHOWN_IDS else ""
        found.append(
            f"{count:,} queued transcripts have no job in Redis: evicted, or deleted; queue them again:"
            f" {', '.join(lost[:SHOWN_IDS])}{more}"
        )
    if status.get("hold"):
        found.append(f"training is paused: {status['hold']}; `tandem resume` ends it")
    replicas = status.get("replicas")
    start = "start `tandem worker`"
    if replicas:
        start = f"start `tandem worker --replica 0/{replicas['count']} --run-dir DIRECTORY` with that of its server"
    if worker and worker["state"] == "none":
        found.append(f"no worker is running: {start}")
    if worker and worker["state"] == "dead":
        found.append(f"worker '{worker['name']}' (pid {worker['pid']}) died: {start}, it takes over")
    if replicas and worker and worker["state"] not in ("none", "dead"):
        found += _replica_problems(replicas)
    waiting = status.get("waiting", [])
    slow = any(one["doing"] in BUSY for one in waiting)  # then who sleeps waits for the same sum as rank 0
    for one in waiting:
        if one["doing"] not in BUSY and not (slow and one["doing"] == SLEEPS):
            found.append(
                f"rank {one['rank']} (process {one['pid']}) {one['doing']}, and the worker has waited for it for"
                f" {one['seconds']:.0f} s: one that is stopped is ended after {STOPPED_SECONDS:g} s, one that hangs"
                f" after some minutes; `kill -9 {one['pid']}` ends it at once, and nothing that was queued is lost"
            )
    if server["state"] == "unreachable":
        found.append(f"the server cannot be reached: {server['reason']}")
    if server["state"] == "torn":
        found.append(f"the server refuses to serve: {server.get('reason')}")
    if worker and "version" in server and server["state"] != "paused" and worker["state"] != "busy":
        if server.get("lineage") not in (None, status["lineage"]) and status["lineage"]:
            found.append("the server has another lineage than Redis: `tandem worker` says what to do")
        elif server["version"] != status["version"]:
            found.append(f"the server is at version {server['version']}, Redis at {status['version']}")
    return found


def _replica_problems(replicas: dict[str, Any]) -> list[str]:
    count, found = replicas["count"], list[str]()
    if missing := [str(n) for n in range(count) if n not in replicas["present"]]:
        found.append(
            f"{len(missing)} of {count} replicas are not there ({', '.join(missing)}): start"
            f" `tandem worker --replica {missing[0]}/{count} --run-dir DIRECTORY` with that of its own server; the"
            " others go on without"
        )
    if times := replicas["unequal"]:
        found.append(
            f"replica digest unequal, {times} times since replica 0 was started: it was given the weights of replica 0."
            " Look for a failing GPU, or for machines that differ; the log of replica 0 says which it was"
        )
    return found


def ago_text(seconds: float) -> str:
    """3 s ago, 5 min ago, 2 h ago, 4 days ago."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(seconds, 0) / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} days ago"
