"""What `status.gather` found, as values of metrics. Pure: nothing is looked up here.

Must not know: torch, vLLM.
Invariant: what status does not know has no value.
"""

from collections.abc import Mapping
from typing import Any

from worker.utils.metrics import POLICIES, SERVER_STATES, WORKER_STATES
from worker.utils.metrics_registry import Values

EVALUATED = {
    "tandem_evaluation_loss": "loss",
    "tandem_evaluation_exact_match_ratio": "exact_match",
    "tandem_evaluation_win_ratio": "win_rate",
}
ALONE: dict[str, Any] = {"count": 1, "present": {0: 0}, "unequal": 0}
"""What a worker without replicas would say of them."""


def values(status: dict[str, Any], header: int | None, disk: Mapping[str, float], now: float) -> Values:
    """status: as `gather` gives it. header: the version it says, if known. disk: metric -> value. now: since 1970."""
    server = status["server"]
    found: dict[str, dict[tuple[str, ...], float]] = {name: {(): value} for name, value in disk.items()}
    found["tandem_redis_up"] = {(): status["redis"]["reachable"]}
    found["tandem_problems"] = {(): len(status["problems"])}
    found["tandem_status_timestamp_seconds"] = {(): now}
    found["tandem_server_state"] = _one_of(SERVER_STATES, server["state"])
    versions = {"header": header, "redis": status.get("version"), "server": server.get("version")}
    found["tandem_version"] = {(source,): version for source, version in versions.items() if version is not None}
    if "queue" in status:
        found |= _from_redis(status, now)
    return {name: of for name, of in found.items() if of}


def _from_redis(status: dict[str, Any], now: float) -> dict[str, dict[tuple[str, ...], float]]:
    worker, eviction, memory = status["worker"], status["eviction"], status["redis"]
    age = (status["last_update"] or {}).get("age_s")
    policy = eviction["name"] if eviction["name"] in POLICIES else "unknown"
    found: dict[str, dict[tuple[str, ...], float]] = {
        "tandem_queue_jobs": {(state,): count for state, count in status["queue"].items()},
        "tandem_worker_state": _one_of(WORKER_STATES, _condition(worker["state"], bool(status["hold"]))),
        "tandem_redis_policy": {(policy,): 1},
    }
    known = {
        "tandem_queue_oldest_job_age_seconds": status["oldest_job_s"],
        "tandem_lost_jobs": status["lost_count"],
        "tandem_ledger_transcripts": status["ledger"],
        "tandem_last_version_timestamp_seconds": None if age is None else now - age,
        "tandem_serving_share_asked_ratio": worker.get("serving_share"),
        "tandem_serving_share_kept_ratio": worker.get("serving_kept"),
        "tandem_redis_memory_bytes": memory.get("used_memory"),
        "tandem_redis_maxmemory_bytes": memory.get("maxmemory"),
        "tandem_redis_evicted_keys_total": memory.get("evicted_keys"),
        "tandem_redis_may_evict": eviction["problem"] is not None,
    }
    replicas = status.get("replicas") or ALONE
    known |= {
        "tandem_replicas": replicas["count"],
        "tandem_replicas_present": len(replicas["present"]),
        "tandem_replica_digest_unequal": replicas["unequal"],
    }
    found |= {name: {(): float(value)} for name, value in known.items() if value is not None}
    found["tandem_canary_loss"] = {(name,): loss for name, loss in status["canary"].items()}
    for name, figure in EVALUATED.items():
        found[name] = {(one["name"],): one[figure] for one in status["evaluations"] if one[figure] is not None}
    return found


def _condition(state: str, held: bool) -> str:
    """The worker's state as `tandem status` shows it, with a paused training as a state of its own."""
    return "paused" if held and state in ("idle", "started", "resting") else state


def _one_of(states: tuple[str, ...], state: str) -> dict[tuple[str, ...], float]:
    return {(one,): one == state for one in states}
