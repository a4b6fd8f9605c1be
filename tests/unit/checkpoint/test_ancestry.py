"""Which versions a version comes from, and who is in it: of made-up journals."""

from pathlib import Path

import pytest

from worker.checkpoint.ancestry import RebuildError, ancestry, contained, perhaps_in, trace
from worker.checkpoint.journal import Entry
from worker.checkpoint.snapshots import Trained

NOWHERE = Path("/nowhere")


def entry(version: int, kind: str, parent: int | None, *ids: str, **more: object) -> Entry:
    found = Entry(version, kind, "b" * 32, parent, 0.0, NOWHERE, 0, list(ids))
    for name, value in more.items():
        setattr(found, name, value)
    return found


def journal(*entries: Entry) -> dict[int, Entry]:
    return {one.version: one for one in entries}


BRANCHED = journal(
    entry(1, "update", 0, "a"),
    entry(2, "update", 1, "b"),
    entry(3, "update", 2, "c", manifest={"rehearsed": ["a"]}),
    entry(4, "rollback", 2, dropped=["b"], without=["b"]),
    entry(5, "update", 4, "d"),
    entry(6, "rollback", 1, without=[]),
)


def test_an_abandoned_branch_is_no_ancestor() -> None:
    assert [one.version for one in ancestry(BRANCHED, 5)] == [1, 2, 4, 5]
    assert [one.version for one in ancestry(BRANCHED, 3)] == [1, 2, 3]
    assert [one.version for one in ancestry(BRANCHED, 6)] == [1, 6]
    assert ancestry(BRANCHED, 0) == [] and ancestry(BRANCHED, 99) == []


def test_who_is_in_a_version() -> None:
    assert contained(BRANCHED, 3) == {"a", "b", "c"}
    assert contained(BRANCHED, 5) == {"a", "d"}, "b was left out when 4 was made, c was abandoned"
    assert contained({3: BRANCHED[3]}, 3) == {"a", "c"}, "a is rehearsed there"


@pytest.mark.parametrize(
    ("first", "version", "expected"),
    [
        (1, 3, {"b", "c"}),  # the journal goes back to the source model: it alone decides
        (1, 5, set()),
        (3, 3, {"b", "c"}),  # b was trained before the journal begins, and not dropped by then
        (4, 5, {"c"}),  # the journal begins with the rollback that dropped b
        (5, 5, {"c"}),  # nobody knows any more that c was abandoned: better a longer replay than c in it
        (6, 4, {"c"}),  # no journal at all: b had been dropped by then
    ],
)
def test_a_checkpoint_that_may_have_somebody_in_it(first: int, version: int, expected: set[str]) -> None:
    left = {v: one for v, one in BRANCHED.items() if v >= first}
    ledger = {id: v for id, v in {"a": 1, "b": 2, "c": 3, "d": 5}.items() if v <= version}
    trained = Trained(ledger, {"b": 4} if version >= 4 else {})
    assert perhaps_in(left, version, frozenset({"b", "c"}), trained) == expected


def test_somebody_who_is_queued_again_may_have_been_trained_twice() -> None:
    again = journal(
        entry(5, "update", 4, "x"),
        entry(6, "rollback", 3, manifest={"requeued": ["y"]}),  # y was trained before the journal begins, in 4
        entry(7, "update", 6, "z"),
        entry(8, "update", 5, "y"),
    )
    assert perhaps_in(again, 5, frozenset({"y"}), Trained({"y": 8}, {})) == {"y"}


def test_a_plan_goes_back_to_what_can_be_loaded() -> None:
    def unusable(version: int) -> str | None:
        return None if version in (0, 2) else "it has no checkpoint"

    assert [one.version for one in trace(BRANCHED, 5, unusable)[1]] == [5]
    assert trace(BRANCHED, 6, unusable)[0] == 0
    pruned = {v: one for v, one in BRANCHED.items() if v > 4}
    with pytest.raises(RebuildError, match=r"version 5 cannot be made.*back to version 4, and it has no checkpoint"):
        trace(pruned, 5, lambda version: "it has no checkpoint")
