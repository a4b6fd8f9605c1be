"""Every metric that Tandem has, in one place: name, type, unit, labels and help.

The worker shows those of port `worker` (--metrics-port), the server those of port `server` in vLLM's own /metrics. The
page docs/metrics.md and the checks of the dashboard and of the alert rules are made from this table.
Must not know: torch, vLLM, Redis.
Invariants: a label has few values, which are listed here; never an id, a user or a text. Base units; counters end in
`_total`.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from producer.feedback import Kind as FeedbackKind

Kind = Literal["counter", "gauge", "histogram"]
Port = Literal["worker", "server"]

KINDS: tuple[str, ...] = get_args(FeedbackKind)
OUTCOMES = ("trained", "failed", "already_trained")
PARTS = (
    *("linger", "tokenize", "step", "gradients", "forward", "backward", "journal"),
    *("wait_for_pause", "pause", "sweep", "commit"),
)
QUEUE_STATES = ("queued", "started", "failed", "finished", "scheduled", "deferred")
WORKER_STATES = ("none", "dead", "starting", "started", "idle", "busy", "resting", "paused", "suspended")
SERVER_STATES = ("serving", "paused", "torn", "unreachable")
RECOVERIES = ("torn", "lost", "committed", "refilled", "dead_worker", "redis_away")
POLICIES = (
    *("noeviction", "allkeys-lru", "allkeys-lfu", "allkeys-random"),
    *("volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl", "unknown"),
)
CODES = ("200", "202", "401", "404", "413", "422", "429", "500", "503")
NATS = "nats a token"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper ends of a histogram's buckets: from a pause on a small model to a long batch on a CPU."""


@dataclass(frozen=True)
class Metric:
    """labels: each label with all of its values; no values: they are few for the reason that `help` gives.

    looked_up: it is not counted as things happen but looked up every few seconds, and missing where it is not known.
    """

    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ports: tuple[Port, ...] = ("worker",)
    looked_up: bool = False


def _looked_up(name: str, help: str, unit: str = "", kind: Kind = "gauge", **labels: tuple[str, ...]) -> Metric:
    return Metric(name, kind, help, unit, labels, looked_up=True)


def _of_server(name: str, kind: Kind, help: str, unit: str = "", **labels: tuple[str, ...]) -> Metric:
    return Metric(name, kind, help, unit, labels, ports=("server",))


LEARNING = (
    Metric("tandem_versions_total", "counter", "Versions this worker has made and committed."),
    Metric(
        "tandem_jobs_total",
        "counter",
        "Jobs by what became of them. failed: failed alone, or sent back for a retry; already_trained: queued again,"
        " and not trained again.",
        labels={"outcome": OUTCOMES},
    ),
    Metric("tandem_trained_jobs_total", "counter", "Trained jobs by kind of feedback.", labels={"kind": KINDS}),
    Metric("tandem_tokens_total", "counter", "Tokens of the trained batches, with the prompts.", "tokens"),
    Metric("tandem_trained_tokens_total", "counter", "Tokens that the loss is over.", "tokens"),
    Metric(
        "tandem_loss",
        "gauge",
        "Mean loss before the update, of the last version that had this kind of feedback. Kinds have their own losses:"
        " compare each with itself only.",
        NATS,
        {"kind": KINDS},
    ),
    Metric("tandem_update_ratio", "gauge", "RMS of the last update over the RMS of the weights.", "ratio"),
    _looked_up(
        "tandem_canary_loss",
        "Loss of a canary set on the version it was scored on last, by the set's name, which the operator gave"
        " it; one without a name is `canary`.",
        NATS,
        set=(),
    ),
    _looked_up(
        "tandem_evaluation_loss", "Loss of a set on the newest version it was evaluated on (tandem eval).", NATS, set=()
    ),
    _looked_up(
        "tandem_evaluation_exact_match_ratio",
        "The part of the set whose greedy answer is the reference.",
        "ratio",
        set=(),
    ),
    _looked_up(
        "tandem_evaluation_win_ratio", "The part of the set's pairs whose chosen answer is likelier.", "ratio", set=()
    ),
    _looked_up("tandem_last_version_timestamp_seconds", "When the last version was made.", "seconds since 1970"),
    Metric("tandem_splits_total", "counter", "Batches that failed with no weight touched and were tried in halves."),
    Metric("tandem_rollbacks_total", "counter", "Rollbacks that this worker made by itself (--auto-rollback)."),
)
COST = (
    Metric(
        "tandem_version_seconds",
        "histogram",
        "Time of one version by part. step is all of the training: gradients (of it, in streaming: forward, backward),"
        " journal, wait_for_pause (until the server stands still), pause (it stands still; of it: sweep, the write)."
        " Before it come linger (the batch fills) and tokenize, after it commit.",
        "seconds",
        {"part": PARTS},
    ),
    Metric("tandem_serving_cost_seconds_total", "counter", "What versions took from running requests.", "seconds"),
    _looked_up("tandem_serving_share_asked_ratio", "--serving-share: the part of the time that is serving's.", "ratio"),
    _looked_up("tandem_serving_share_kept_ratio", "The part of the last minute that updates left to serving.", "ratio"),
    _of_server(
        "tandem_pause_seconds", "histogram", "How long requests that came in a pause had to wait, at most.", "seconds"
    ),
)
QUEUE = (
    _looked_up("tandem_queue_jobs", "Jobs of the queue by state; queued is its depth.", state=QUEUE_STATES),
    _looked_up(
        "tandem_queue_oldest_job_age_seconds",
        "How long the job at the front of the queue has waited; 0: none waits.",
        "seconds",
    ),
    _looked_up("tandem_lost_jobs", "Queued transcripts of the last day whose job is gone: evicted, or deleted."),
    _looked_up("tandem_ledger_transcripts", "Transcripts in the ledger: all that was ever trained."),
    _of_server(
        "tandem_completions_total",
        "counter",
        "Completions that --record was to keep. skipped: one alone is more than all may take; dropped:"
        " Redis was away, full or too slow.",
        outcome=("kept", "skipped", "dropped"),
    ),
    _of_server("tandem_feedback_requests_total", "counter", "Calls of /v1/feedback by HTTP status.", code=CODES),
)
STATE = (
    Metric(
        "tandem_build_info",
        "gauge",
        "1; the installed version of Tandem.",
        labels={"version": ()},
        ports=("worker", "server"),
    ),
    _looked_up("tandem_worker_state", "1 for the worker's state, 0 for all others.", state=WORKER_STATES),
    Metric(
        "tandem_server_state",
        "gauge",
        "1 for the server's state, 0 for all others, as the port that shows it sees the server.",
        labels={"state": SERVER_STATES},
        ports=("worker", "server"),
        looked_up=True,
    ),
    Metric(
        "tandem_version",
        "gauge",
        "Version of the weights by who says so: the header beside them, Redis, the server that answers from them.",
        labels={"source": ("header", "redis", "server")},
        ports=("worker", "server"),
        looked_up=True,
    ),
    Metric(
        "tandem_recoveries_total",
        "counter",
        "What was put right. torn: half-written weights, made again; lost: a restarted server's; committed, refilled:"
        " versions that Redis did not know; dead_worker: jobs that one held; redis_away: Redis came back.",
        labels={"what": RECOVERIES},
    ),
    _looked_up("tandem_replicas", "How many replicas are to train as one (--replica I/N); 1 for a worker alone."),
    _looked_up("tandem_replicas_present", "How many of them are there."),
    _looked_up(
        "tandem_replica_digest_unequal",
        "How often a replica's weights were not those of replica 0 after a version, since replica 0 was started.",
    ),
    _looked_up("tandem_problems", "How many problems `tandem status` names. It says what to do."),
    _looked_up("tandem_status_timestamp_seconds", "When the worker last looked these things up.", "seconds since 1970"),
    _of_server("tandem_tears_total", "counter", "How often the weights tore: half-written, and not served."),
    _of_server("tandem_overdue_leases_total", "counter", "Pauses that a trainer did not end in time."),
    _of_server("tandem_trainer_connected", "gauge", "1 while a trainer is connected to the server, else 0."),
)
STORES = (
    _looked_up("tandem_journal_bytes", "Size of the journal.", "bytes"),
    _looked_up("tandem_checkpoint_bytes", "Size of all checkpoints.", "bytes"),
    _looked_up("tandem_checkpoints", "How many checkpoints there are."),
    _looked_up("tandem_state_free_bytes", "What may still be written to the state directory's disk.", "bytes"),
    _looked_up("tandem_redis_up", "1 if Redis answers the worker, else 0."),
    _looked_up("tandem_redis_memory_bytes", "Memory that Redis uses (used_memory).", "bytes"),
    _looked_up("tandem_redis_maxmemory_bytes", "What Redis may use (maxmemory); 0: no limit.", "bytes"),
    _looked_up("tandem_redis_evicted_keys_total", "Keys that Redis has evicted since its start.", kind="counter"),
    _looked_up("tandem_redis_policy", "1 for Redis' maxmemory-policy.", policy=POLICIES),
    _looked_up("tandem_redis_may_evict", "1 if Redis may throw away what Tandem has there when its memory is full."),
)
GROUPS = {
    "Learning": LEARNING,
    "What it costs serving": COST,
    "Queue and feedback": QUEUE,
    "State": STATE,
    "Disk and Redis": STORES,
}
METRICS: dict[str, Metric] = {metric.name: metric for group in GROUPS.values() for metric in group}
