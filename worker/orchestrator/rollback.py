"""Rolling back: the live server goes back to an older version, published as a new one.

The version is made again from a checkpoint and the journal, without the dropped transcripts: their batches keep their
optimizer steps, and one that is emptied is a step that changes nothing. Versions after VERSION are abandoned: no longer
in the weights. Their transcripts, and the dropped ones, stay in the ledger, so that nobody trains them by accident;
with `requeue` the abandoned ones are queued again and leave it.

Invariants: the rollback is in the journal before the weights change, so that a crash in the middle of it is finished by
the next start; versions and lineage only go forward.
"""

from typing import Any

import redis

from producer.errors import TandemError
from worker.checkpoint.rebuild import Plan, Rebuilt
from worker.checkpoint.records import RollbackRecord
from worker.config.protocol import TornWeightsError, UnavailableError
from worker.config.version_record import VersionRecord
from worker.orchestrator.recovery import begin_rebuild
from worker.orchestrator.reports import Report, RolledBack
from worker.orchestrator.requeue import requeue as requeue_ids
from worker.orchestrator.session import Session
from worker.utils.fault_injection import point
from worker.versions import ledger


class RollbackError(TandemError):
    """The request makes no sense as it is; nothing was changed."""


def roll_back(
    connection: redis.Redis,
    session: Session,
    target: int,
    drop: tuple[str, ...] = (),
    *,
    reason: str = "",
    requeue: bool = False,
) -> list[Report]:
    """Make `target` again without `drop`, live in the server, as the next version; what was done.

    For the writer of the weights, between updates, with Redis and the weights agreed. Raises `RollbackError`,
    `RebuildError` or `JournalError` with nothing changed; whatever else is raised must end the worker, and the next
    start does the rest: `TornWeightsError` while the header says APPLYING (the server answers 503), `UnavailableError`
    when it is CLEAN.
    """
    manager, header = session.manager, session.weights.header
    history, rebuilder = manager.history, manager.rebuilder
    now, version, lineage = header.version, header.version + 1, header.lineage
    trained = history.trained(now)
    _check(trained.ledger, now, target, drop)
    plan = rebuilder.plan(target, frozenset(drop))
    stays = history.contained(target) - plan.dropped
    abandoned = [entry for entry in history.entries(target, now) if entry.ids]
    later = list(dict.fromkeys(id for entry in abandoned for id in entry.ids))
    again = [id for id in later if id not in plan.dropped | stays] if requeue else []
    retaken = sorted(stays - trained.ledger.keys())  # queued again by a rollback that this one goes back on
    manifest: dict[str, Any] = {"kind": "rollback", "at": ledger.utc(), "base": now, "target": target}
    manifest |= {"tokens": 0, "dropped": list(drop), "requeued": again, "retaken": retaken, "reason": reason}
    manifest |= {"abandoned": [entry.version for entry in abandoned]}
    settle = requeue_ids(connection, manager.journal, again)
    manager.journal.append(RollbackRecord(version, lineage, target, list(drop), manifest, sorted(plan.without)))
    point("journaled")
    reports: list[Report] = [_write(session, plan, version)]
    if not plan.dropped & history.contained(target) and (compared := rebuilder.compare(target)):
        reports.append(compared)
    manager.after(version, manifest)
    ledger.commit(connection, VersionRecord(version, lineage, [], manifest), settle)
    counts = len(abandoned), len(later), len(again), len(retaken)
    reports.append(RolledBack(version, target, drop, *counts))
    if written := manager.checkpoints.try_write():
        reports.append(written)
    return reports


def _write(session: Session, plan: Plan, version: int) -> Rebuilt:
    """Pause the server, make the weights what `plan` says, and let it go on under `version`."""
    try:
        begin_rebuild(session.control, session.weights.header, len(plan.steps))
    except BaseException as error:
        session.manager.void(version)
        if isinstance(error, TandemError):
            raise UnavailableError(f"the server could not be paused: {error}") from error
        raise
    try:
        rebuilt = session.manager.rebuilder.rebuild(plan, session.weights.header.lineage, version)
    except BaseException as error:
        raise TornWeightsError(
            f"version {version}, which is to be version {plan.version} again, broke off while it was written"
            f" ({type(error).__name__}: {error}); the server refuses requests. Start the worker again: it finishes the"
            " rollback"
        ) from error
    try:
        session.control.resume(version, rebuilt=True)
    except TandemError as error:
        raise UnavailableError(f"the server could not be resumed at version {version}: {error}") from error
    session.renew_trainer()
    return rebuilt


def _check(trained: dict[str, int], now: int, target: int, drop: tuple[str, ...]) -> None:
    if not 0 <= target <= now:
        raise RollbackError(f"version {target} does not exist: the live one is {now}")
    if target == now and not drop:
        raise RollbackError(f"version {target} is live: name an older one, or what to --drop from it")
    if unknown := [id for id in drop if id not in trained]:
        raise RollbackError(f"--drop {unknown[0]}: no version was trained on it (`tandem log` lists who was)")
