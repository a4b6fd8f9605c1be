"""What a check of `tandem doctor` finds: plain facts, no sentences.

Must not know: torch, vLLM, Redis. cli/doctor_sentences.py makes the English.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is. UNCHECKED: it could not be looked at, and `values` says why."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    UNCHECKED = "not checked"


class Fact(StrEnum):
    """Every kind of fact; each has its sentence. Those of one check stand together, the good one first."""

    REDIS_ANSWERS = "redis_answers"
    REDIS_AWAY = "redis_away"
    REDIS_VERSION = "redis_version"
    REDIS_OLD = "redis_old"
    REDIS_SILENT = "redis_silent"
    REDIS_REFUSED = "redis_refused"
    NO_REDIS = "no_redis"
    KEEPS_KEYS = "keeps_keys"
    EVICTS = "evicts"
    NEARLY_FULL = "nearly_full"
    PERSISTENT = "persistent"
    NO_APPENDONLY = "no_appendonly"
    WRITES_FAIL = "writes_fail"
    RIGHTS = "rights"
    RIGHTS_MISSING = "rights_missing"
    KEY_TYPES = "key_types"
    KEY_TYPE_WRONG = "key_type_wrong"
    QUICK = "quick"
    SLOW = "slow"
    CLOCK = "clock"
    CLOCK_OFF = "clock_off"
    VERSION_FROM_THE_FUTURE = "version_from_the_future"
    SERVER = "server"
    SERVER_PAUSED = "server_paused"
    SERVER_TORN = "server_torn"
    SERVER_AWAY = "server_away"
    NO_SERVER = "no_server"
    WEIGHTS = "weights"
    WEIGHTS_TORN = "weights_torn"
    WEIGHTS_WRITTEN = "weights_written"
    OTHER_LINEAGE = "other_lineage"
    OTHER_VERSION = "other_version"
    OTHER_PACKAGE = "other_package"
    FLAGS = "flags"
    FLAG_REFUSED = "flag_refused"
    DRAFTER_STALE = "drafter_stale"
    NO_LEFTOVERS = "no_leftovers"
    LEFTOVERS = "leftovers"
    WORKER = "worker"
    WORKER_NONE = "worker_none"
    WORKER_DEAD = "worker_dead"
    WORKER_SILENT = "worker_silent"
    WORKER_OTHER = "worker_other"
    REPLICA = "replica"
    REPLICA_NONE = "replica_none"
    TRAINING_PAUSED = "training_paused"
    GPU_FITS = "gpu_fits"
    GPU_SHARE_SMALL = "gpu_share_small"
    GPU_NOT_FREE = "gpu_not_free"
    GPU_UNCHECKED = "gpu_unchecked"
    PACKAGE = "package"
    PACKAGE_UNTESTED = "package_untested"
    PACKAGE_REFUSED = "package_refused"
    PACKAGE_MISSING = "package_missing"
    STATE = "state"
    STATE_NEW = "state_new"
    STATE_UNREADABLE = "state_unreadable"
    STATE_UNWRITABLE = "state_unwritable"
    STATE_OPEN = "state_open"
    STATE_FOREIGN = "state_foreign"
    STATE_UNKNOWN = "state_unknown"
    FORMATS = "formats"
    FORMATS_UNREAD = "formats_unread"
    FORMAT_REFUSED = "format_refused"
    OTHER_MODEL = "other_model"
    CHECKPOINTS = "checkpoints"
    CHECKPOINT_FILES_GONE = "checkpoint_files_gone"
    ROOM = "room"
    ROOM_SMALL = "room_small"
    NO_ROOM = "no_room"
    SOCKETS = "sockets"
    SOCKETS_NONE = "sockets_none"
    SOCKETS_FOREIGN = "sockets_foreign"
    SOCKETS_OPEN = "sockets_open"
    SOCKETS_LONG = "sockets_long"


@dataclass(frozen=True)
class Finding:
    """check: what was looked at, in a word or two. values: what the fact's sentence needs; never a secret or a text
    of a transcript."""

    check: str
    level: Level
    fact: Fact
    values: dict[str, Any] = field(default_factory=dict)


def ok(check: str, fact: Fact, **values: Any) -> Finding:
    return Finding(check, Level.OK, fact, values)


def warning(check: str, fact: Fact, **values: Any) -> Finding:
    return Finding(check, Level.WARNING, fact, values)


def fault(check: str, fact: Fact, **values: Any) -> Finding:
    return Finding(check, Level.FAULT, fact, values)


def unchecked(check: str, fact: Fact, **values: Any) -> Finding:
    return Finding(check, Level.UNCHECKED, fact, values)
