"""The worker: whether the one that holds the queue lives, beats, and trains the server of this run directory.

Must not know: torch, vLLM. Invariant: only reads.
"""

from collections.abc import Mapping
from typing import Any

from worker.consumer.worker_lock import TTL
from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked, warning
from worker.operations.doctor.server_view import ServerView


def check_worker(known: Mapping[str, Any], server: ServerView) -> Finding:
    """known: `status.gather`'s answer."""
    if "worker" not in known:
        return unchecked("worker", Fact.NO_REDIS)
    worker = known["worker"]
    who = {name: worker.get(name) for name in ("name", "pid", "host", "since")}
    trainer = server.state.get("trainer") or {}
    if worker["state"] == "none":
        return fault("worker", Fact.WORKER_NONE)
    if worker["state"] == "dead":
        return fault("worker", Fact.WORKER_DEAD, **who)
    working = ok("worker", Fact.WORKER, **who, state=worker["state"])
    if server.state and trainer.get("name") != worker["name"]:
        if (replicas := known.get("replicas")) is None:
            return fault("worker", Fact.WORKER_OTHER, **who, trainer=trainer.get("name"))
        if not trainer:
            return fault("worker", Fact.REPLICA_NONE, **who, count=replicas["count"])
        working = ok("worker", Fact.REPLICA, **who, state=worker["state"], trainer=trainer["name"])
    if (worker.get("silent_s") or 0.0) > TTL:
        return fault("worker", Fact.WORKER_SILENT, **who, seconds=worker["silent_s"])
    if known.get("hold"):
        return warning("worker", Fact.TRAINING_PAUSED, **who, reason=known["hold"])
    return working
