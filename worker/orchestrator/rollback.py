"""Rolling back: the live server goes back to an older version, published as a new one.

The version is made again from a checkpoint and the journal, without the dropped transcripts: their batches keep their
optimizer steps, and one that is emptied is a step that changes nothing. Versions after VERSION are abandoned: no longer
in the weights. Their transcripts, and the dropped ones, stay in the ledger, so that nobody trains them by accident;
with `requeue` the abandoned ones are queued again and leave it.

Must not know: how weights are restored, RQ's inside.
Invariants: the rollback is in the journal before the weights change, so that a crash in the middle of it is finished by
the next start; versions and lineage only go forward.
"""

from typing import Any

import redis

from producer.errors import TandemError
from worker.orchestrator.live_update import SharedUpdate
from worker.orchestrator.requeue import requeue as requeue_ids
from worker.utils.fault_injection import point
from worker.versions import ledger


class CannotRollBack(TandemError):
    """The request makes no sense as it is; nothing was changed."""


def roll_back(
    connection: redis.Redis,
    step: SharedUpdate,
    target: int,
    drop: tuple[str, ...] = (),
    *,
    reason: str = "",
    requeue: bool = False,
) -> list[str]:
    """Make `target` again without `drop`, live in the server, as the next version; what was done, in sentences.

    For the writer of the weights, between updates, with Redis and the weights agreed. Raises `CannotRollBack` or
    `CannotRebuild` with nothing changed; whatever else is raised leaves the rest to the next start of a worker.
    """
    keeper, header = step.keeper, step.weights.header
    now = header.version
    _check(keeper.trained(now).ledger, now, target, drop)
    plan = keeper.plan(target, frozenset(drop))
    abandoned = [entry for entry in keeper.entries(target, now) if entry.ids]
    again = [id for entry in abandoned for id in entry.ids if id not in drop] if requeue else []
    version, lineage = now + 1, header.lineage
    manifest: dict[str, Any] = {"kind": "rollback", "at": ledger.utc(), "base": now, "target": target}
    manifest |= {"tokens": 0, "dropped": list(drop), "requeued": again, "reason": reason}
    manifest |= {"abandoned": [entry.version for entry in abandoned]}
    record = {"kind": "rollback", "version": version, "lineage": lineage, "parent": target, "dropped": list(drop)}
    settle = requeue_ids(connection, keeper.journal, again)
    keeper.journal.append(record | {"ids": [], "manifest": manifest})
    point("journaled")
    try:
        step.control.pause()
    except BaseException:
        keeper.void(version)
        raise
    said = keeper.rebuild(plan, lineage, version)
    step.control.resume(version, rebuilt=True)
    step.trainer = keeper.make_trainer(step.h)  # the optimizer's step count is another now
    if not drop and (same := keeper.compare(target)):
        said.append(f"the weights are those of version {target}, {same}")
    keeper.measured(version, manifest)
    committed = {"version": version, "lineage": lineage, "jobs": [], "manifest": manifest, "results": {}}
    ledger.commit(connection, committed, settle)
    said.append(_summary(version, target, drop, abandoned, again))
    if written := keeper.checkpoint():
        said.append(written)
    return said


def _check(trained: dict[str, int], now: int, target: int, drop: tuple[str, ...]) -> None:
    if not 0 <= target <= now:
        raise CannotRollBack(f"version {target} does not exist: the live one is {now}")
    if target == now and not drop:
        raise CannotRollBack(f"version {target} is live: name an older one, or what to --drop from it")
    if unknown := [id for id in drop if id not in trained]:
        raise CannotRollBack(f"--drop {unknown[0]}: no version was trained on it (`tandem log` lists who was)")


def _summary(version: int, target: int, drop: tuple[str, ...], abandoned: list[Any], again: list[str]) -> str:
    text = f"version {version} is live: it is version {target}"
    if drop:
        text += f" without {', '.join(drop)}"
    if abandoned:
        count = sum(len(entry.ids) for entry in abandoned)
        fate = (
            f"{len(again)} of them are queued again" if again else "they stay in the ledger and are not trained again"
        )
        text += f"; {count} transcripts of {len(abandoned)} later versions are no longer in the weights, {fate}"
    return text
