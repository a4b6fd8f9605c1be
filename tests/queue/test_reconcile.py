"""Reconciling header, record and Redis: the rule by itself, and applied to a real Redis."""

import itertools
from typing import Any

import msgpack
import pytest
import redis

from producer import keys
from worker.config.version_record import NoVersionRecordError, VersionRecord
from worker.consumer.settlement import settle_with_rq
from worker.versions import ledger
from worker.versions.ledger import LedgerState
from worker.versions.reconcile import IrreconcilableError, decide, reconcile

A, B = "a" * 32, "b" * 32


def header(version: int, lineage: str = A, state: str = "CLEAN") -> dict[str, Any]:
    return {"lineage": lineage, "version": version, "state": state}


def record(version: int, *jobs: str, lineage: str = A, **manifest: Any) -> VersionRecord:
    results = {job: {"version": version} for job in jobs}
    return VersionRecord(version, lineage, list(jobs), manifest, results)


@pytest.mark.parametrize(
    ("head", "rec", "known", "kind", "new", "action", "version"),
    [
        (header(0), None, LedgerState(0, None), "", False, "introduce", 0),
        (header(0), None, LedgerState(0, A), "", False, "nothing", 0),
        (header(0, B), None, LedgerState(0, A), "", False, "introduce", 0),
        (header(7), record(7), LedgerState(7, A), "batch", False, "nothing", 7),
        (header(7), None, LedgerState(7, A), "batch", False, "nothing", 7),
        (header(7), record(7), LedgerState(7, A), "batch", True, "nothing", 7),
        (header(8), record(8, "j"), LedgerState(7, A), "batch", False, "commit", 8),
        (header(8), record(8, "j"), LedgerState(7, A), "batch", True, "commit", 8),
        (header(1), record(1, "j"), LedgerState(0, None), "", False, "commit", 1),
        (header(12), record(12, base=7), LedgerState(7, A), "batch", False, "commit", 12),
        (header(0, B), None, LedgerState(7, A), "batch", True, "lineage", 8),
        (header(3, B), record(3, lineage=B), LedgerState(7, A), "batch", True, "lineage", 8),
        (header(5), record(5), LedgerState(0, None), "", True, "lineage", 1),
        (header(0, B), None, LedgerState(8, B), "lineage", False, "adopt", 8),
        (header(0, B), None, LedgerState(7, None), "batch", True, "lineage", 8),
    ],
)
def test_what_can_be_settled_is(
    head: dict[str, Any],
    rec: dict[str, Any] | None,
    known: LedgerState,
    kind: str,
    new: bool,
    action: str,
    version: int,
) -> None:
    decision = decide(head, rec, known, kind, new)
    assert (decision.action, decision.version) == (action, version) and decision.said


@pytest.mark.parametrize(
    ("head", "rec", "known", "kind", "new", "says"),
    [
        (
            header(7, state="APPLYING"),
            record(8),
            LedgerState(7, A),
            "batch",
            False,
            "torn.*not restored.*--new-lineage",
        ),
        (header(7, state="APPLYING"), record(8), LedgerState(7, A), "batch", True, "torn"),
        (header(7, state="?"), None, LedgerState(7, A), "batch", False, "torn"),
        (header(8), None, LedgerState(7, A), "batch", False, "record beside the weights is none"),
        (header(8), record(7), LedgerState(7, A), "batch", False, "record beside the weights is of version 7"),
        (header(8), record(8, lineage=B), LedgerState(7, A), "batch", False, f"lineage {B}"),
        (header(9), record(9), LedgerState(7, A), "batch", False, "Redis lost 2 versions"),
        (header(9), record(9), LedgerState(7, A), "batch", True, "Redis lost 2 versions"),
        (header(9), record(9, base=6), LedgerState(7, A), "batch", False, "Redis lost 2 versions"),
        (header(5), record(5), LedgerState(0, None), "", False, "Redis lost 5 versions"),
        (header(6), record(6), LedgerState(7, A), "batch", False, "older than what Redis counted"),
        (header(6), record(6), LedgerState(7, A), "batch", True, "older than what Redis counted"),
        (header(0), None, LedgerState(7, A), "batch", False, "older than what Redis counted"),
        (header(0, B), None, LedgerState(7, A), "batch", False, "restarted.*--new-lineage.*version 8"),
        (header(8, B), record(8, lineage=B), LedgerState(7, A), "batch", False, "restarted"),
        (header(0), None, LedgerState(7, None), "batch", False, "of lineage unknown"),
        (header(1, B), record(1, lineage=B), LedgerState(0, A), "", False, "restarted"),
    ],
)
def test_what_only_a_person_may_settle_is_refused_with_the_facts(
    head: dict[str, Any], rec: dict[str, Any] | None, known: LedgerState, kind: str, new: bool, says: str
) -> None:
    with pytest.raises(IrreconcilableError, match=f"(?s){says}"):
        decide(head, rec, known, kind, new)


def test_no_case_is_forgotten_and_none_loses_learning_unasked() -> None:
    """Every combination ends in a decision or a refusal; without being told, a version is never skipped or undone."""
    heads = [header(v, lin, s) for v in (0, 1, 2, 3, 8) for lin in (A, B) for s in ("CLEAN", "APPLYING")]
    records = [None, *(record(v, "j", lineage=lin) for v in (1, 2, 3, 8) for lin in (A, B))]
    knowns = [LedgerState(v, lin) for v in (0, 1, 2, 7) for lin in (None, A, B)]
    decided = 0
    for head, rec, known, kind, new in itertools.product(heads, records, knowns, ("", "batch", "lineage"), (0, 1)):
        try:
            decision = decide(head, rec, known, kind, bool(new))
        except IrreconcilableError:
            continue
        decided += 1
        assert head["state"] == "CLEAN"
        if decision.action == "commit":
            assert rec is not None and rec.version == head["version"] == known.version + 1
            assert rec.lineage == head["lineage"] and known.lineage in (None, head["lineage"])
        elif decision.action == "lineage":
            assert new and decision.version == known.version + 1 and known.lineage != head["lineage"]
        elif decision.action == "adopt":
            assert head["version"] == 0 and kind == "lineage" and known.lineage == head["lineage"]
        elif decision.action == "introduce":
            assert head["version"] == known.version == 0
        else:
            assert head["version"] == known.version and known.lineage == head["lineage"]
    assert decided > 100


def refuse_to_adopt(lineage: str, version: int) -> None:
    pytest.fail(f"adopted {lineage} {version}")


def test_a_first_start_introduces_the_weights(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    (said,) = reconcile(
        connection, header(0), None, new_lineage=False, settle=settle_with_rq(connection), adopt=refuse_to_adopt
    )
    assert A in said and ledger.state(connection) == LedgerState(0, A)
    (said,) = reconcile(
        connection, header(0), None, new_lineage=False, settle=settle_with_rq(connection), adopt=refuse_to_adopt
    )
    assert "agree" in said


def test_a_recorded_batch_is_committed_once(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    ledger.commit(connection, record(1, "a"))
    said = reconcile(
        connection,
        header(2),
        record(2, "b", "gone").plain(),
        new_lineage=False,
        settle=settle_with_rq(connection),
        adopt=refuse_to_adopt,
    )
    assert "2 jobs" in said[1]
    assert ledger.versions(connection, ["a", "b", "gone"]) == {"a": 1, "b": 2, "gone": 2}
    (said_again,) = reconcile(
        connection,
        header(2),
        record(2, "b", "gone").plain(),
        new_lineage=False,
        settle=settle_with_rq(connection),
        adopt=refuse_to_adopt,
    )
    assert "agree" in said_again and connection.xlen(keys.EVENTS) == 2


@pytest.mark.parametrize(
    "broken", [{"jobs": "b"}, {"lineage": None}, {"version": "2"}, {"manifest": []}, {"results": 0}]
)
def test_a_record_that_is_none_of_ours_is_named_and_touches_nothing(redis_url: str, broken: dict[str, Any]) -> None:
    connection = redis.Redis.from_url(redis_url)
    ledger.commit(connection, record(1, "a"))
    before = {key: connection.dump(key) for key in connection.keys("*")}
    with pytest.raises(NoVersionRecordError, match=f"no usable {next(iter(broken))}: .* restart the server"):
        reconcile(
            connection,
            header(2),
            record(2, "b").plain() | broken,
            new_lineage=False,
            settle=settle_with_rq(connection),
            adopt=refuse_to_adopt,
        )
    assert {key: connection.dump(key) for key in connection.keys("*")} == before


def test_a_record_is_stored_as_a_plain_map_and_read_again() -> None:
    given = record(3, "a", "b", base=1, loss=0.5, dropped=["x"])
    assert VersionRecord.from_plain(msgpack.unpackb(msgpack.packb(given.plain()))) == given
    assert (given.base, record(3).base) == (1, 2)


def test_a_new_lineage_takes_a_version_and_survives_a_crash_before_the_header_knows(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    ledger.commit(connection, record(1, "a"))
    with pytest.raises(IrreconcilableError):
        reconcile(
            connection, header(0, B), None, new_lineage=False, settle=settle_with_rq(connection), adopt=refuse_to_adopt
        )
    assert ledger.state(connection) == LedgerState(1, A)

    def dies(lineage: str, version: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconcile(connection, header(0, B), None, new_lineage=True, settle=settle_with_rq(connection), adopt=dies)
    assert ledger.state(connection) == LedgerState(2, B)
    manifest = ledger.manifest(connection, 2)
    assert (manifest["kind"], manifest["jobs"], manifest["previous_lineage"]) == ("lineage", "[]", A)
    adopted: list[tuple[str, int]] = []
    reconcile(
        connection,
        header(0, B),
        None,
        new_lineage=False,
        settle=settle_with_rq(connection),
        adopt=lambda lin, v: adopted.append((lin, v)),
    )
    assert adopted == [(B, 2)]
    assert ledger.versions(connection, ["a"]) == {"a": 1}, "what was trained stays known: it is not trained again"
    ledger.commit(connection, record(3, "b", lineage=B))
    assert ledger.state(connection) == LedgerState(3, B)


def test_a_refusal_touches_nothing(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    ledger.commit(connection, record(1, "a"))
    before = {key: connection.dump(key) for key in connection.keys("*")}
    for head in (header(5), header(0), header(1, state="APPLYING"), header(0, B)):
        with pytest.raises(IrreconcilableError):
            reconcile(
                connection, head, None, new_lineage=False, settle=settle_with_rq(connection), adopt=refuse_to_adopt
            )
    assert {key: connection.dump(key) for key in connection.keys("*")} == before
