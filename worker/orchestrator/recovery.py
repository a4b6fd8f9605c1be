"""At the start of a worker: header, journal, checkpoints and Redis are brought to one truth.

First the weights (`mend_weights`): torn or restarted ones become the newest version that the journal or a checkpoint
has. Then Redis (`mend_redis`): what it lost of the versions is written again. What remains is for `reconcile`.

Invariants: `decide` is pure; nobody is trained here who was not in the journal; nothing that Redis has is taken back;
what is refused leaves everything as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import redis

from producer import keys
from producer.errors import TandemError
from worker.apollo import NonFiniteGradientError
from worker.checkpoint.checkpoint_writer import Written
from worker.checkpoint.journal import Entry
from worker.checkpoint.manager import CheckpointManager
from worker.checkpoint.records import LineageRecord, UpdateRecord
from worker.checkpoint.snapshots import Trained
from worker.config.version_record import VersionRecord
from worker.consumer.settlement import settle_with_rq
from worker.orchestrator.reports import CommittedAgain, LeftOut, Live, Lost, NotApplied, Refilled, Report
from worker.orchestrator.requeue import requeue
from worker.serving.control_client import ServerControl
from worker.shared_weights.header import CLEAN, Header
from worker.utils.signals import deferred
from worker.versions import ledger
from worker.versions.ledger import LedgerState
from worker.versions.reconcile import RESTART

RESTORE_SECONDS, REPLAY_SECONDS = 120.0, 30.0
"""How long a checkpoint and one batch take, generously: until the server says that its trainer hangs."""
CHUNK = 10_000
"""Ledger entries a round trip."""


class UnrecoverableError(TandemError):
    """The weights cannot be brought to what was learnt; the message has the facts and the way out."""


@dataclass(frozen=True)
class Decision:
    """action: nothing | void (the last journaled version was never applied) | rebuild (`version` of `lineage`)."""

    action: Literal["nothing", "void", "rebuild"]
    version: int = 0
    lineage: str = ""


def decide(
    header: dict[str, Any], latest: tuple[int, str] | None, known: LedgerState | None, *, new_lineage: bool, where: str
) -> Decision:
    """The whole rule for the weights. latest: the newest (version, lineage) in the state directory `where`; known: what
    Redis says, None when nobody asked it. Raises `UnrecoverableError`."""
    version, lineage, torn = header["version"], header["lineage"], header["state"] != CLEAN
    if latest is None:
        if torn:
            raise UnrecoverableError(
                f"the weights are torn (a worker died while writing version {version + 1}), and the state directory"
                f" {where} has neither journal nor checkpoint of them: {RESTART}"
            )
        return Decision("nothing")
    newest, ours = latest
    if not torn and lineage == ours:
        if version >= newest:
            return Decision("nothing")
        if version == newest - 1:
            return Decision("void", newest, ours)
    if not torn and lineage != ours:
        if new_lineage or newest == 0 or (known is not None and known.lineage == lineage):
            return Decision("nothing")
        if version > 0:
            raise UnrecoverableError(
                f"the server's weights are at version {version} of lineage {lineage}, and the state directory {where}"
                f" ends at version {newest} of lineage {ours}: {_ways(newest)}"
            )
    if known is not None and known.version and known.lineage not in (None, ours):
        raise UnrecoverableError(
            f"Redis counts lineage {known.lineage} (version {known.version}), and the state directory {where} holds"
            f" lineage {ours} (version {newest}): use --state-dir to name the directory of this Redis, or {RESTART}"
        )
    if known is not None and known.version > newest:
        raise UnrecoverableError(
            f"the server lost its weights, Redis is at version {known.version}, and the state directory {where} only"
            f" goes to version {newest}: put its newer files back, or go on without what was learnt: {RESTART}"
        )
    return Decision("rebuild", newest, ours)


def _ways(newest: int) -> str:
    return (
        f"restart the server and start the worker to go on from version {newest}, or run `tandem worker --new-lineage`"
        " to go on from the weights as they are"
    )


def mend_weights(
    manager: CheckpointManager, control: ServerControl, known: LedgerState | None, *, new_lineage: bool = False
) -> list[Report]:
    """Bring the weights to what the state directory knows; what was found and done.

    Raises `UnrecoverableError`, `RebuildError` (nothing was changed), or what a replay raises: then the server stays
    torn.
    """
    header: dict[str, Any] = dict(manager.weights.header.fields())
    where = str(manager.journal.folder.parent)
    decision = decide(header, manager.history.latest(), known, new_lineage=new_lineage, where=where)
    reports: list[Report] = [*manager.notices]
    if decision.action == "void":
        manager.void(decision.version)
        reports.append(NotApplied(decision.version))
    elif decision.action == "rebuild":
        lost = Lost(header["state"] != CLEAN, header["version"], header["lineage"], decision.version)
        reports += [lost, *_rebuild(manager, control, decision.version, decision.lineage)]
    return reports


def _rebuild(manager: CheckpointManager, control: ServerControl, version: int, lineage: str) -> list[Report]:
    rebuilder, reports = manager.rebuilder, list[Report]()
    plan = rebuilder.plan(version)  # everything is read and checked before anything changes
    begin_rebuild(control, manager.weights.header, len(plan.steps))
    try:
        reports.append(rebuilder.rebuild(plan, lineage, version))
    except NonFiniteGradientError:
        if not plan.steps or plan.steps[-1].version != version:
            raise
        # The journal's last batch was refused the first time too, and its `Voided` was not written any more.
        manager.void(version)
        reports.append(LeftOut(version))
        version -= 1
        plan = rebuilder.plan(version)  # streaming has written half of it
        reports.append(rebuilder.rebuild(plan, lineage, version))
    if compared := rebuilder.compare(version):
        reports.append(compared)
    control.resume(version, rebuilt=True)
    return [*reports, Live(version, lineage)]


def begin_rebuild(control: ServerControl, header: Header, batches: int) -> None:
    """The server stands still and the header says APPLYING: the weights may be made again, through `batches` of the
    journal."""
    control.pause(RESTORE_SECONDS + REPLAY_SECONDS * batches)
    header.hold(control.fence)


def mend_redis(connection: redis.Redis, manager: CheckpointManager, header: dict[str, Any]) -> list[Report]:
    """Write again what Redis lost of versions that the journal or a checkpoint has; what was done.

    Nothing when Redis counts other weights: that is for `reconcile` to judge.
    """
    known, latest = ledger.state(connection), manager.history.latest()
    if latest is None or known.version >= latest[0] or known.lineage not in (None, latest[1]):
        return []
    if known.lineage is None and known.version:
        return []
    version, lineage = latest
    if header["lineage"] != lineage and known.version == version - 1:
        # Weights that are lost, and Redis never heard of this version: nobody counts it as trained.
        if version in manager.journal.entries:
            manager.void(version)
        return []
    missing = manager.history.entries(known.version, version)
    whole = [entry.version for entry in missing] == list(range(known.version + 1, version + 1))
    if whole and known.lineage is not None:
        return [_commit_again(connection, manager, missing)]
    return [_fill(connection, manager, version, lineage, known.version)]


def _commit_again(connection: redis.Redis, manager: CheckpointManager, missing: list[Entry]) -> CommittedAgain:
    for entry in missing:
        journaled = manager.journal.read(entry.version)
        record = record_of(entry, journaled.results if isinstance(journaled, UpdateRecord) else {})
        if again := entry.manifest.get("requeued"):
            settle = requeue(connection, manager.journal, again)
        else:
            settle = settle_with_rq(connection)(record.results)
        ledger.commit(connection, record, settle, new_lineage=entry.kind == "lineage")
    return CommittedAgain(missing[0].version, missing[-1].version, sum(len(entry.ids) for entry in missing))


def record_of(entry: Entry, results: dict[str, Any]) -> VersionRecord:
    """What the ledger commits for a journaled version."""
    return VersionRecord(entry.version, entry.lineage, entry.ids, entry.manifest | {"base": entry.version - 1}, results)


def _fill(connection: redis.Redis, manager: CheckpointManager, version: int, lineage: str, known: int) -> Refilled:
    """Version, ledger and manifests into a Redis that lost them. Repeatable: the version comes last."""
    trained = manager.history.trained(version)
    for key, entries in ((keys.LEDGER, trained.ledger), (keys.DROPPED, trained.dropped)):
        pairs = list(entries.items())
        for start in range(0, len(pairs), CHUNK):
            connection.hset(key, mapping=dict(pairs[start : start + CHUNK]))
    with connection.pipeline() as pipe:
        for entry in manager.history.entries(known, version):
            ledger.write_manifest(record_of(entry, {}), pipe)
        pipe.set(keys.VERSION, version)
        pipe.hset(keys.STATE, mapping={"version": version, "lineage": lineage, "at": ledger.utc()})
        pipe.execute()
    return Refilled(known, version, lineage, len(trained.ledger))


def take_note(manager: CheckpointManager, everybody: Callable[[], Trained]) -> Written | None:
    """Last at a start: weights that the state directory does not know (its first start, another's training) enter it,
    with a checkpoint, since nobody could make them again. everybody: who was trained and dropped, as Redis has it."""
    header, history = manager.weights.header, manager.history
    version, lineage = header.version, header.lineage
    if history.latest() != (version, lineage):
        manager.adopt(version, lineage, everybody() if version else Trained({}, {}))
    entry = manager.journal.entries.get(version)
    alone = entry is not None and entry.kind == LineageRecord.kind and entry.parent is None
    return manager.checkpoints.write() if alone else None


def take_over(manager: CheckpointManager, control: ServerControl, lineage: str, version: int) -> None:
    """The weights as they are go on as `version` of `lineage`: in the journal, the header and what clients are told."""
    header, latest = manager.weights.header, manager.history.latest()
    if latest != (version, lineage):
        fresh = header.version == 0
        known = Trained({}, {}) if fresh else manager.history.trained((latest or (0, ""))[0])
        manager.adopt(version, lineage, known, parent=0 if fresh else None)
    with deferred():
        control.pause()
        header.begin(control.fence)
        header.adopt(lineage, version)
        control.resume(version)
