"""Which versions a version was made from, and who is in it: pure functions over the journal's entries.

Invariant: an abandoned branch is no part of the ancestry.
"""

from collections.abc import Callable, Mapping

from producer.errors import TandemError
from worker.checkpoint.journal import Entry
from worker.checkpoint.snapshots import Trained


class RebuildError(TandemError):
    """A version cannot be made again from what the state directory holds."""


def ancestry(entries: Mapping[int, Entry], version: int) -> list[Entry]:
    """The entries that lead to `version`, itself included, oldest first, as far back as the journal goes."""
    found: list[Entry] = []
    at: int | None = version
    while at and (entry := entries.get(at)) is not None:  # version 0 is the source model
        found.append(entry)
        at = entry.parent
    return found[::-1]


def contained(entries: Mapping[int, Entry], version: int) -> set[str]:
    """The ids that the journal knows to be in the weights of `version`, rehearsed ones included."""
    inside: set[str] = set()
    for entry in ancestry(entries, version):
        if entry.kind == "update":
            inside |= ids_of(entry)
        inside -= set(entry.without)
    return inside


def ids_of(entry: Entry) -> set[str]:
    """Whose tokens were in the batch of an update: its jobs', and what was rehearsed."""
    return {*entry.ids, *entry.manifest.get("rehearsed", [])}


def perhaps_in(entries: Mapping[int, Entry], version: int, ids: frozenset[str], trained: Trained) -> set[str]:
    """Those of `ids` that may be in the weights of the checkpoint of `version`. trained: what it says of everybody.

    The journal decides as far as it goes. Whoever was trained before that is in the weights, unless dropped by then.
    """
    way = ancestry(entries, version)
    inside = contained(entries, version) & ids
    if way and way[0].parent == 0:
        return inside
    begin = way[0].version if way else version + 1
    again = {id for entry in entries.values() for id in entry.manifest.get("requeued", [])}
    rest = ids - inside - {id for entry in way for id in entry.without} - trained.dropped.keys()
    old = {id for id in rest if trained.ledger.get(id, begin) < begin}
    return inside | old | {id for id in rest & again if id in trained.ledger}


def trace(entries: Mapping[int, Entry], version: int, unusable: Callable[[int], str | None]) -> tuple[int, list[Entry]]:
    """From which usable version, through which updates, oldest first, `version` comes. Raises `RebuildError`.

    unusable: why the weights of a version cannot be loaded; None if they can.
    """
    path: list[Entry] = []
    at = version
    while (reason := unusable(at)) is not None:
        entry = entries.get(at)
        if entry is None or entry.parent is None:
            why = "its journal was pruned" if entry is None else "its weights came from elsewhere"
            raise RebuildError(
                f"version {version} cannot be made: it goes back to version {at}, and {reason}, and {why}"
            )
        if entry.kind == "update":
            path.append(entry)
        at = entry.parent
    return at, path[::-1]
