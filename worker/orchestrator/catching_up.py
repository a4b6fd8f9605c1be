"""A replica that joins is brought to replica 0's weights: by their tensors, not from its disk.

    bring_up(group, session)             replica 0: to each member what it lacks
    be_brought_up(group, session, tell)  every other one; its server stands still while its weights are written

    1. Each says where it stands: lineage, version, whether whole, and a checksum of weights and optimizer's state.
    2. Replica 0 answers: where it stands itself, who gets its weights, and what its journal holds, by version.
    3. Weights, to each who differs. Then each asks for the journal's records that it lacks.

Invariants: afterwards lineage, version, weights and state are those of replica 0, bit for bit, and the journal or a
checkpoint on disk leads to them. No journal has texts of who was dropped, however far it goes back. The header says
APPLYING while tensors come in: whoever is lost then is torn, and is brought up again.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import msgpack
import torch

from worker.checkpoint import records
from worker.checkpoint.journal import Entry
from worker.checkpoint.manager import CheckpointManager
from worker.checkpoint.records import Measured, UpdateRecord
from worker.checkpoint.redaction import redact
from worker.checkpoint.snapshots import SnapshotError, Trained
from worker.distributed.checksum import checksum
from worker.distributed.group import Group
from worker.orchestrator.recovery import begin_rebuild
from worker.orchestrator.reports import Live, Tell
from worker.orchestrator.session import Session
from worker.shared_weights.header import CLEAN

log = logging.getLogger("tandem")

CHUNK = 100_000
"""Ledger entries in a message."""
PROTOCOL = 2
"""2: another name for the model."""


def hello_of(session: Session) -> dict[str, Any]:
    """What must be the same at all replicas, by the name that an error gives it."""
    weights, trainer = session.weights, session.trainer
    layout = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in weights.named_tensors()]
    return {
        "protocol": PROTOCOL,
        "model (a digest of its files)": session.manager.journal.source,
        "layout of the weights": hashlib.sha256(msgpack.packb(layout)).hexdigest()[:16],
        "torch": torch.__version__,
        "device": trainer.device.type,
        "way of applying (--apply)": trainer.way,
        "longest row (--max-tokens, --max-length)": trainer.room.longest,
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(session.h).items()},
    }


def misfit(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why a replica that says `theirs` cannot train with one that says `ours`; None if it can."""
    for name in ours:
        if theirs.get(name) != ours[name]:
            return f"{name} is {str(theirs.get(name))[:80]} there and {ours[name]} here: start all replicas alike"
    return None


def standing(session: Session) -> dict[str, Any]:
    """Where the weights are, and a checksum of them and of the optimizer's state."""
    fields = session.weights.header.fields()
    tensors = [tensor for _, tensor in session.weights.named_tensors()]
    digest = checksum([*tensors, session.weights.state])
    return {"lineage": fields["lineage"], "version": fields["version"], "state": fields["state"], "digest": digest}


def bring_up(group: Group, session: Session) -> None:
    """As replica 0. Raises `GroupLostError`."""
    ours, manager = standing(session), session.manager
    every = group.gather(ours)
    assert every is not None
    behind = [place for place, theirs in enumerate(every) if theirs != ours]
    tensors = [place for place in behind if every[place]["digest"] != ours["digest"] or every[place]["state"] != CLEAN]
    journal = {version: _identity(entry) for version, entry in manager.journal.entries.items()}
    group.tell(
        ours | {"behind": behind, "tensors": tensors, "journal": journal, "dropped": sorted(manager.history.dropped())}
    )
    for place in tensors:
        for tensor in _all(session):
            group.hand(tensor, place)
    record = session.weights.record.read() or {}
    group.tell({"record": record})
    for place in group.others:
        _serve_journal(group, place, manager, ours["version"])


def be_brought_up(group: Group, session: Session, tell: Tell) -> None:
    """As every other member. Raises `GroupLostError`, and what pausing our server raises."""
    group.gather(standing(session))
    told = group.tell()
    header, version, lineage = session.weights.header, int(told["version"]), str(told["lineage"])
    behind = group.place in told["behind"]
    if behind:
        begin_rebuild(session.control, header, 0)
    if group.place in told["tensors"]:
        for tensor in _all(session):
            group.take(tensor, 0)
    record = group.tell()["record"]
    if behind:
        if record:
            session.weights.record.write(record)
        header.adopt(lineage, version)
        session.control.resume(version, rebuilt=True)
        session.renew_trainer()
        tell(Live(version, lineage))
    _catch_up_journal(group, session.manager, version, lineage, told)


def _all(session: Session) -> list[torch.Tensor]:
    """What is handed on: all weights in the order of their names, and the optimizer's state."""
    return [*(tensor for _, tensor in session.weights.named_tensors()), session.weights.state]


def _identity(entry: Entry) -> bytes:
    """Two journals that have the same for a version hold the same version."""
    said = [entry.kind, entry.lineage, entry.parent, entry.ids, entry.dropped, str(entry.manifest.get("at"))]
    return hashlib.blake2b(msgpack.packb(said), digest_size=8).digest()


def _serve_journal(group: Group, place: int, manager: CheckpointManager, version: int) -> None:
    """To one member: the records that it asks for, or, where they do not reach back far enough, who was trained."""
    asked = group.hear(place)
    for wanted in asked["versions"]:
        entry = manager.journal.entries[wanted]
        record = replace(manager.journal.read(wanted), time=entry.time)
        group.say({"record": record.plain(), "manifest": entry.manifest}, place)
    if asked["trained"]:
        trained = manager.history.trained(version)
        pairs = list(trained.ledger.items())
        parts = [dict(pairs[start : start + CHUNK]) for start in range(0, len(pairs), CHUNK)]
        group.say({"parts": len(parts), "dropped": trained.dropped}, place)
        for part in parts:
            group.say({"ledger": part}, place)


def _set_aside_others(
    manager: CheckpointManager, version: int, lineage: str, same: Collection[int], theirs: Collection[int]
) -> None:
    """Checkpoints of versions that are not replica 0's: restored, they would be other weights; and no other checkpoint
    could be written under their names."""
    snapshots, journal = manager.history.snapshots, manager.journal
    for found in snapshots.versions():
        if found in same:
            continue
        try:
            known = snapshots.describe(found).lineage == lineage
        except SnapshotError:
            known = False  # damaged
        if found > version or not known or (found in theirs and found in journal.entries):
            log.warning(
                "the checkpoint of version %d was not made of replica 0's weights: it is set aside as %s; delete it if"
                " nobody needs it",
                found, snapshots.set_aside(found),
            )  # fmt: skip


def _catch_up_journal(
    group: Group, manager: CheckpointManager, version: int, lineage: str, told: Mapping[str, Any]
) -> None:
    journal, theirs = manager.journal, {int(v): bytes(i) for v, i in told["journal"].items()}
    for later in [v for v in journal.entries if v > version]:
        manager.void(later)
    same = {v for v, identity in theirs.items() if v in journal.entries and _identity(journal.entries[v]) == identity}
    _set_aside_others(manager, version, lineage, same, theirs.keys())
    base = max(manager.history.snapshots.versions(), default=0)
    lacking = [v for v in sorted(theirs) if v not in same and v <= version]
    reaches = set(range(base + 1, version + 1)) <= theirs.keys() and manager.history.latest() is not None
    reaches = reaches or set(range(0, version + 1)) <= theirs.keys()
    if not reaches and version in same:
        reaches, lacking = True, []
    group.say({"versions": lacking if reaches else [], "trained": not reaches}, 0)
    for _ in lacking if reaches else []:
        message = group.hear(0)
        record = records.parse(message["record"])
        journal.append(record)
        if isinstance(record, UpdateRecord):
            journal.append(Measured(record.version, message["manifest"]), durable=False)
    if not reaches:
        first = group.hear(0)
        known = Trained({}, dict(first["dropped"]))
        for _ in range(first["parts"]):
            known.ledger.update(group.hear(0)["ledger"])
        manager.adopt(version, lineage, known)
        manager.checkpoints.try_write()
    redact(journal, told["dropped"])
