"""What `tandem doctor` says of each fact: what is so, and what to do about it.

Must not know: torch, vLLM, Redis.
"""

from pathlib import Path
from typing import Any

from worker.operations.doctor.finding import Fact, Finding
from worker.utils.hints import with_run_dir

SAID = "{said}"
"""A sentence of the part itself, which says what to do."""

SENTENCES: dict[Fact, str | tuple[str, str]] = {
    Fact.REDIS_ANSWERS: "{url} answers",
    Fact.REDIS_AWAY: SAID,
    Fact.REDIS_VERSION: "{name}",
    Fact.REDIS_OLD: ("{name} is too old for the rights of a producer's user", "install Redis {oldest} or Valkey"),
    Fact.REDIS_SILENT: (
        "Redis does not let this user ask ({command})",
        "give the worker's user the rights in docs/redis.md",
    ),
    Fact.REDIS_REFUSED: "Redis answered with an error: {said}",
    Fact.NO_REDIS: "Redis does not say which worker runs",
    Fact.KEEPS_KEYS: "{policy}, {used} used of {limit}",
    Fact.EVICTS: (
        "Redis evicts keys when its memory is full (maxmemory-policy {policy}), and queued transcripts are lost",
        "CONFIG SET maxmemory-policy noeviction, and in redis.conf",
    ),
    Fact.NEARLY_FULL: ("Redis has used {used} of {limit} and will soon queue nothing", "raise maxmemory"),
    Fact.PERSISTENT: "appendonly is on",
    Fact.NO_APPENDONLY: (
        "appendonly is off: a restart of Redis loses what was queued since its last snapshot",
        "CONFIG SET appendonly yes, and in redis.conf",
    ),
    Fact.WRITES_FAIL: ("Redis cannot write to its disk ({name})", "see its log, and make room on its disk"),
    Fact.RIGHTS: "the user may do all that a {role} does",
    Fact.RIGHTS_MISSING: (
        "the user of the URL lacks {count} of the commands of a {role}: {first}",
        "ACL SETUSER with the {role}'s rules in docs/redis.md, or give the URL of another user",
    ),
    Fact.KEY_TYPES: "{count} are there, each of the type that Tandem and RQ keep",
    Fact.KEY_TYPE_WRONG: (
        "{key} is a {found}, and a {expected} is kept there: another program writes it",
        "give Tandem a database of its own, or stop that program and DEL {key} if nothing in it is wanted",
    ),
    Fact.QUICK: "{seconds:.4f} s a round trip",
    Fact.SLOW: ("{seconds:.3f} s a round trip, and a transcript waits for about ten", "put Redis nearer to the worker"),
    Fact.CLOCK: "within {seconds:.3f} s of Redis'",
    Fact.CLOCK_OFF: (
        "this machine's clock and Redis' are {seconds:.1f} s apart",
        "set both by NTP (timedatectl set-ntp true): leases and the ages of jobs go by them",
    ),
    Fact.VERSION_FROM_THE_FUTURE: (
        "the newest version was made {seconds:.0f} s in the future of this machine's clock",
        "set the clocks of all machines by NTP (timedatectl set-ntp true)",
    ),
    Fact.SERVER: "serving version {version}",
    Fact.SERVER_PAUSED: ("paused by {trainer} for an update", "look again in a minute"),
    Fact.SERVER_TORN: ("it answers 503, since its weights are half-written", "see weights"),
    Fact.SERVER_AWAY: SAID,
    Fact.NO_SERVER: "no server is running here",
    Fact.WEIGHTS: "version {version}, whole",
    Fact.WEIGHTS_TORN: (
        "half-written: a trainer died while it wrote the version after {version}, and the server answers 503",
        "start `tandem worker`, which restores them from the state directory",
    ),
    Fact.WEIGHTS_WRITTEN: "the version after {version} is being written",
    Fact.OTHER_LINEAGE: (
        "the server was started again and has version {version} of its own, where Redis has version {redis}",
        "start `tandem worker`, which restores what the model had learnt",
    ),
    Fact.OTHER_VERSION: (
        "the server is at version {version} and Redis at {redis}",
        "start `tandem worker`, which commits or restores what is missing",
    ),
    Fact.OTHER_PACKAGE: (
        "it runs {package} {running}, and {installed} is installed here",
        "start the server again, in the worker's environment",
    ),
    Fact.FLAGS: "none that `tandem serve` refuses",
    Fact.FLAG_REFUSED: (SAID, "leave it out"),
    Fact.DRAFTER_STALE: (
        "the speculative drafter ({method}) does not learn with the model",
        "leave it out when /metrics says that too few drafted tokens are accepted",
    ),
    Fact.NO_LEFTOVERS: "nothing of a killed server is left",
    Fact.LEFTOVERS: (
        "a killed server left its engine, which holds the device's memory: {pids}",
        "start `tandem serve` with the same --run-dir, which ends it, or kill it",
    ),
    Fact.WORKER: "'{name}' (pid {pid} on {host}) is {state}",
    Fact.WORKER_NONE: ("none is running: nothing is trained, and what is queued waits", "start `tandem worker`"),
    Fact.WORKER_DEAD: ("'{name}' (pid {pid} on {host}) died", "start `tandem worker`, which takes over"),
    Fact.WORKER_SILENT: (
        "'{name}' (pid {pid} on {host}) gave no sign of life for {seconds:.0f} s",
        "see its log; if it hangs, kill -9 it and start `tandem worker`",
    ),
    Fact.WORKER_OTHER: (
        "another worker, '{name}' (pid {pid} on {host}), holds the queue and does not train this server"
        " (whose trainer is {trainer})",
        "stop that worker, or give this one a Redis of its own",
    ),
    Fact.REPLICA: "'{trainer}' trains this server as a replica; replica 0, '{name}' (pid {pid} on {host}), is {state}",
    Fact.REPLICA_NONE: (
        "nobody trains this server, and '{name}' (pid {pid} on {host}) is replica 0 of {count}",
        "start `tandem worker --replica I/{count}` with the number of this server's replica",
    ),
    Fact.TRAINING_PAUSED: ("training is paused: {reason}", "`tandem resume`"),
    Fact.GPU_FITS: "{share} are set aside, {needed} needed at least, {free} free",
    Fact.GPU_SHARE_SMALL: (
        "the server leaves {share} to the trainer, which needs {needed} at least",
        "start the server without --trainer-memory, or with a larger one",
    ),
    Fact.GPU_NOT_FREE: (
        "{free} are free on the server's device, of {share} that it set aside and {needed} that training needs",
        "see nvidia-smi for who has the rest, and end it",
    ),
    Fact.GPU_UNCHECKED: "{reason}",
    Fact.PACKAGE: "{name} {version} (tested: {tested})",
    Fact.PACKAGE_UNTESTED: (
        "{name} {version} should work and was not tested (tested: {tested})",
        "where something fails, try a tested one",
    ),
    Fact.PACKAGE_REFUSED: (SAID, "pip install -U 'tandem-worker[worker]'"),
    Fact.PACKAGE_MISSING: "not installed, and not needed beside vLLM's CPU build",
    Fact.STATE: "{path} is ours alone and readable",
    Fact.STATE_NEW: "{path} does not exist yet: the worker makes it",
    Fact.STATE_UNREADABLE: (
        "{path} cannot be read by uid {uid} ({reason})",
        "run as the worker's user, or chown -R it to this one",
    ),
    Fact.STATE_UNWRITABLE: (
        "{path} cannot be written by uid {uid}, or its disk is mounted read-only: nothing can be journaled",
        "mount it for writing, run as the worker's user, or name another --state-dir",
    ),
    Fact.STATE_OPEN: ("{path} has mode {mode}, and transcripts are in it", "chmod 700 it"),
    Fact.STATE_FOREIGN: ("{path} belongs to uid {owner}, not {uid}", "run as that user, or name another --state-dir"),
    Fact.STATE_UNKNOWN: ("no server says of which model it would be", "name it with --state-dir"),
    Fact.FORMATS: "{files} files of journal and checkpoints, in formats that this Tandem reads",
    Fact.FORMATS_UNREAD: "there is nothing in {path} that can be read",
    Fact.FORMAT_REFUSED: SAID,
    Fact.OTHER_MODEL: (
        "{path} is of another model than {model}",
        "serve the model that it began with, or name another directory with --state-dir",
    ),
    Fact.CHECKPOINTS: "{count}, each with all its files",
    Fact.CHECKPOINT_FILES_GONE: (
        "the checkpoint {path} lacks {count} of its files: {first}",
        "bring them back from a backup, or delete the folder: older checkpoints and the journal make its version again,"
        " where they reach back so far",
    ),
    Fact.ROOM: "{free} free, {checkpoint} for the next checkpoint, {journal} for the journal's next file",
    Fact.ROOM_SMALL: (
        "{free} free in {path}: a checkpoint takes {checkpoint}, the journal's next file {journal}",
        "make room, keep fewer checkpoints (--keep-checkpoints), or name another --state-dir",
    ),
    Fact.NO_ROOM: (
        "no space: {free} free in {path}, and the next checkpoint takes {checkpoint}; nothing that is not"
        " journaled is trained",
        "make room, keep fewer checkpoints (--keep-checkpoints), or name another --state-dir",
    ),
    Fact.SOCKETS: "{path} is ours alone",
    Fact.SOCKETS_NONE: "{path} does not exist yet: `tandem serve` makes it",
    Fact.SOCKETS_FOREIGN: ("{path} is no folder of uid {uid}", "name another with --run-dir, for server and worker"),
    Fact.SOCKETS_OPEN: ("{path} has mode {mode}: others can reach the sockets", "chmod 700 it"),
    Fact.SOCKETS_LONG: SAID,
}
"""What is so; where something is to be done, with what to do."""
BYTES = ("used", "limit", "free", "checkpoint", "journal", "share", "needed")
"""Values that are numbers of bytes."""


def sentence(finding: Finding, run_dir: Path | None = None) -> tuple[str, str]:
    """(what is so, what to do; empty where nothing is to be done). run_dir: what was examined."""
    said = SENTENCES[finding.fact]
    what, mend = (said, "") if isinstance(said, str) else said
    values = {name: _shown(name, value) for name, value in finding.values.items()}
    return what.format(**values), with_run_dir(mend.format(**values), run_dir)


def line(finding: Finding, run_dir: Path | None = None) -> str:
    """fault        eviction           Redis evicts keys ...: CONFIG SET maxmemory-policy noeviction"""
    what, mend = sentence(finding, run_dir)
    text = f"{finding.level:<12} {finding.check:<18} {what}{f': {mend}' if mend else ''}"
    return " ".join(text.splitlines())


def _shown(name: str, value: Any) -> Any:
    if name in BYTES:
        if name == "limit" and not value:
            return "no limit"
        return "an unknown number of bytes" if value is None else gigabytes(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else value


def gigabytes(count: int) -> str:
    """12.34 GB, 56.7 MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
