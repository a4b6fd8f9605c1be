"""Every Redis name, and every lifetime that both sides must agree on, in one place."""

QUEUE = "feedback"
"""The RQ queue of transcripts."""

FUNCTION = "worker.train"
"""The only function name that the worker's allow-list knows. It is a name, never an import path."""

VERSION = "weights:version"
"""Integer: the version of the weights that is live and committed."""

LEDGER = "weights:ledger"
"""Hash: transcript id -> version that contains it. It is never trimmed: it is what makes training exactly-once."""

DROPPED = "weights:dropped"
"""Hash: transcript id -> version that was made without it. It stays in the ledger too, so that it never comes back."""

LOST = "weights:lost"
"""Hash: id -> when the worker found it queued without a job: evicted, or deleted. Bounded (versions/lost_jobs.py)."""

EVENTS = "weights:events"
"""Stream: one entry a version."""

STATE = "weights:state"
"""Hash: lineage and what the worker last said of itself."""

COMPLETIONS = "completions:index"
"""Sorted set: which completions are recorded, by when they expire (completions.py). A producer cannot read it."""

COMPLETION_BYTES = "completions:bytes"
"""Integer: what all recorded completions take."""

FEEDBACK_USERS = "feedback:users"
"""Hash: id of a transcript that feedback made -> of which answer it is and whose opinion, as digests (opinions.py). It
is never trimmed, as the ledger: `tandem forget` finds by it what was trained on somebody's word."""

EVALUATIONS = "weights:evaluations"
"""Sorted set: names of evaluated sets, by when they were last evaluated. Bounded (worker/versions/evaluations.py)."""

WORKER_LOCK = "weights:worker"
"""String with a time to live: the one worker that may train this queue."""

MAX_RETRIES = 3
"""How often RQ may hand out a transcript again after its worker died."""

RESULT_TTL = 7 * 24 * 3600
"""Seconds a finished job stays readable; afterwards the ledger still knows its version."""

FAILURE_TTL = 365 * 24 * 3600
"""Seconds a failed job waits to be looked at and requeued."""

JOB_TIMEOUT = 3600
"""Seconds RQ may consider a started job alive without a heartbeat; a step is never interrupted by it."""


def manifest(version: int) -> str:
    """Hash: what went into `version` (jobs, tokens, loss, at, ...)."""
    return f"weights:manifest:{version}"


def evaluation(name: str) -> str:
    """Hash: what `tandem eval` found for the set `name`, "version:lineage" -> JSON of its figures. Never text."""
    return f"weights:evaluation:{name}"


def evaluation_scores(name: str) -> str:
    """Hash: the same by conversation, for comparisons in pairs: "version:lineage" -> JSON."""
    return f"weights:evaluation-scores:{name}"


def completion(key: str) -> str:
    """String: the completion recorded under `key`, msgpack, with a time to live."""
    return f"completion:{key}"


def said(key: str) -> str:
    """String: what users said so far of the completion recorded under `key`, msgpack (said.py). It expires with it."""
    return f"feedback:said:{key}"
