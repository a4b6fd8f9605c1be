"""At the start of a worker: do the weights and Redis tell the same story, and if not, may we mend it?

Must not know: torch, RQ.
Invariants: the weights are the truth (the header lives and dies with them); nothing is ever trained or untrained here;
`decide` is pure; what is refused leaves Redis and the header as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import redis
from redis.client import Pipeline

from producer.errors import TandemError
from worker.config.version_record import VersionRecord
from worker.versions import ledger

RESTART = "restart the server (tandem serve ...), then run `tandem worker --new-lineage`"


class IrreconcilableError(TandemError):
    """Weights and Redis disagree in a way only a person may settle; the message has the facts and the way out."""


@dataclass(frozen=True)
class Decision:
    """What to do. action: nothing | introduce (tell Redis the lineage) | commit (the recorded batch) | lineage
    (a new lineage takes `version`) | adopt (only the header is behind: it takes `version`)."""

    action: Literal["nothing", "introduce", "commit", "lineage", "adopt"]
    version: int
    said: str


def decide(
    header: dict[str, Any], record: VersionRecord | None, known: ledger.LedgerState, kind: str, new_lineage: bool
) -> Decision:
    """The whole rule. header: {"lineage", "version", "state"}; known: Redis; kind: its latest manifest's kind.

    Raises IrreconcilableError.
    """
    lineage, version = header["lineage"], header["version"]
    if header["state"] != "CLEAN":
        raise IrreconcilableError(
            f"the weights are torn: a worker died while writing version {version + 1} (header {header['state']},"
            f" lineage {lineage}), and they were not restored: {RESTART}"
        )
    facts = f"the server's weights are at version {version} of lineage {lineage}, Redis is at version {known.version}"
    if known.lineage == lineage or (known.lineage is None and known.version == 0):
        return _same_lineage(header, record, known, kind, new_lineage, facts)
    other = known.lineage or "unknown"
    if known.version == 0 and version == 0:
        return Decision("introduce", 0, f"new weights, lineage {lineage}; Redis had no versions of lineage {other}")
    if not new_lineage:
        raise IrreconcilableError(
            f"{facts} of lineage {other}: the server was restarted (or is another), and what was learned is not in"
            " its weights. Go on from the weights as they are with `tandem worker --new-lineage`: they become version"
            f" {known.version + 1}, and transcripts in the ledger are not trained again"
        )
    return Decision("lineage", known.version + 1, f"new lineage {lineage} starts as version {known.version + 1}")


def _same_lineage(
    header: dict[str, Any],
    record: VersionRecord | None,
    known: ledger.LedgerState,
    kind: str,
    new_lineage: bool,
    facts: str,
) -> Decision:
    lineage, version = header["lineage"], header["version"]
    if version == known.version:
        if known.lineage is None:
            return Decision("introduce", 0, f"new weights, lineage {lineage}, version 0")
        unneeded = "; --new-lineage was not needed" if new_lineage else ""
        return Decision("nothing", version, f"weights and Redis agree: version {version}, lineage {lineage}{unneeded}")
    ours = record is not None and record.version == version and record.lineage == lineage
    if record is not None and ours and record.base == known.version:
        many = f"versions {known.version + 1} to {version} were" if version > known.version + 1 else "version {} was"
        return Decision("commit", version, f"{many.format(version)} in the weights but not in Redis")
    if version == known.version + 1:
        found = "none" if record is None else f"of version {record.version}, lineage {record.lineage}"
        raise IrreconcilableError(f"{facts}, and the batch record beside the weights is {found}: {RESTART}")
    if version == 0 and kind == "lineage":
        return Decision("adopt", known.version, f"lineage {lineage} goes on as version {known.version}")
    if known.lineage is None and new_lineage:
        return Decision("lineage", known.version + 1, f"Redis was empty; lineage {lineage} is counted on from 1")
    if version > known.version:
        raise IrreconcilableError(
            f"{facts}: Redis lost {version - known.version} versions (restored from an old copy, or emptied), and"
            f" their transcripts could be trained twice. Restore Redis, or {RESTART}"
        )
    raise IrreconcilableError(
        f"{facts} of the same lineage: the weights are older than what Redis counted, so what was learned since is"
        f" not in them: {RESTART}"
    )


def reconcile(
    connection: redis.Redis,
    header: dict[str, Any],
    recorded: dict[str, Any] | None,
    *,
    new_lineage: bool,
    adopt: Callable[[str, int], None],
    settle: Callable[[dict[str, Any]], Callable[[Pipeline], None]],
) -> list[str]:
    """Decide and apply; returns what was found and done, in plain sentences. Call it with the worker lock held.

    recorded: the plain map beside the weights. adopt(lineage, version): make the header beside the weights say so;
    called after Redis knows it.
    settle(results): what finishes a recorded batch's jobs on a pipeline.
    """
    known = ledger.state(connection)
    kind = ledger.manifest(connection, known.version).get("kind", "") if known.version else ""
    record = None if recorded is None else VersionRecord.from_plain(recorded)
    decision = decide(header, record, known, kind, new_lineage)
    said = [decision.said]
    if decision.action == "introduce":
        ledger.introduce(connection, header["lineage"])
    elif decision.action == "commit":
        assert record is not None
        ledger.commit(connection, record, settle(record.results))
        count = len(record.jobs)
        said.append(f"committed version {decision.version} and its {count} jobs; none will be trained again")
    elif decision.action == "lineage":
        was = {"kind": "lineage", "previous_lineage": known.lineage or "", "previous_version": known.version}
        ledger.commit(connection, VersionRecord(decision.version, header["lineage"], [], was), new_lineage=True)
    if decision.action in ("lineage", "adopt"):
        adopt(header["lineage"], decision.version)
    return said
