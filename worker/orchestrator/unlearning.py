"""Takes transcripts out of the weights for good, and their texts out of the journal: for `tandem forget`.

The live version is made again without them, as `tandem rollback --drop` does.
Invariants: a text leaves the journal only when its transcript is dropped, so that every version can still be made
again; what stays in the weights is said, with the reason.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import redis

from producer.errors import TandemError
from worker.checkpoint.ancestry import RebuildError, perhaps_in
from worker.checkpoint.redaction import redact
from worker.checkpoint.snapshots import SnapshotError
from worker.orchestrator.reports import Report
from worker.orchestrator.rollback import roll_back
from worker.orchestrator.session import Session


@dataclass
class Unlearnt:
    """dropped: ids that are in the weights no more; still: ids that are, and why; batches: in how many of the journal
    texts were emptied; checkpoints: versions whose files may hold them still."""

    dropped: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)
    why: str = ""
    reports: list[Report] = field(default_factory=list)
    batches: int = 0
    checkpoints: list[int] = field(default_factory=list)


def unlearn(connection: redis.Redis, session: Session, ids: Collection[str]) -> Unlearnt:
    """Make the live version again without `ids`. For the writer of the weights, with Redis and weights agreed.

    Raises what `roll_back` raises, and `JournalError`; after that it may be repeated.
    """
    history, journal = session.manager.history, session.manager.journal
    now, wanted = session.weights.header.version, frozenset(ids)
    known = history.trained(now)
    trained = frozenset(id for id in wanted if id in known.ledger) - known.dropped.keys()
    out, why = _removable(session, trained)
    found = Unlearnt(sorted(out), sorted(trained - out), why)
    if out:
        found.reports = roll_back(connection, session, now, tuple(found.dropped), reason="forgotten")
    gone = out | (wanted & known.dropped.keys())
    found.batches = redact(journal, gone)
    found.checkpoints = _holding(session, gone)
    return found


def _removable(session: Session, ids: frozenset[str]) -> tuple[frozenset[str], str]:
    """Those of `ids` that the live version can be made again without; why not the others."""
    rebuilder, snapshots, history = (
        session.manager.rebuilder,
        session.manager.history.snapshots,
        session.manager.history,
    )
    now, why = session.weights.header.version, ""
    if not ids:
        return ids, why
    try:
        rebuilder.plan(now, ids)
        return ids, why
    except RebuildError as error:
        why = str(error)
    way = history.ancestry(now)
    versions = {entry.version for entry in way} | {entry.parent for entry in way[:1]}
    for base in [version for version in snapshots.versions() if version in versions]:
        try:
            some = ids - perhaps_in(session.manager.journal.entries, base, ids, snapshots.trained(base))
            if some:
                rebuilder.plan(now, some)
                return some, why
        except (RebuildError, SnapshotError) as error:
            why = str(error)
    return frozenset(), why


def _holding(session: Session, ids: frozenset[str]) -> list[int]:
    """Versions with a checkpoint whose weights may hold one of `ids`, or of which nobody can say."""
    snapshots, entries = session.manager.history.snapshots, session.manager.journal.entries
    found = []
    for version in snapshots.versions():
        try:
            inside = bool(perhaps_in(entries, version, ids, snapshots.trained(version)))
        except TandemError:
            inside = True
        if ids and inside:
            found.append(version)
    return found
