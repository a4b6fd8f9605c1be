"""A short campaign of `benchmarks/chaos.py`: kills of worker, server and Redis, broken off once and gone on with.

The seed is fixed and named in every failure; the long campaigns are run by hand, their figures are in DESIGN.md.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_audit import Verdict, audit, check_books, live_digest
from chaos_campaign import Campaign
from chaos_history import Model
from chaos_plan import OPTIONS, CanaryFails, Kill, Rollback, operations, plan, transcript
from chaos_processes import Cluster

from producer import Transcript, keys
from worker.shared_weights.attach import attach
from worker.utils import fault_injection

SEED, KILLS, TRANSCRIPTS = 11, 8, 130  # more than the kills can need, so that each finds work


class BrokenOff(Exception):
    """Somebody stopped the campaign."""


@pytest.fixture(scope="module")
def survived(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Campaign, Verdict]]:
    """The cluster after all kills, the campaign, and the audit's verdict."""
    folder = tmp_path_factory.mktemp("chaos")
    settings: dict[str, Any] = {"seed": SEED, "kills": KILLS, "transcripts": TRANSCRIPTS}

    def break_off(done: int, what: str) -> None:
        if done == KILLS // 2:
            raise BrokenOff

    first = Cluster(folder, tiny_model, options=OPTIONS)
    try:
        with pytest.raises(BrokenOff):
            Campaign(first, **settings).run(break_off)
    finally:
        first.close()
    cluster = Cluster(folder, tiny_model, options=OPTIONS)
    try:
        campaign = Campaign(cluster, **settings)
        assert campaign.done == KILLS // 2
        campaign.run()
        yield cluster, campaign, audit(cluster, campaign.manifests, TRANSCRIPTS)
    finally:
        cluster.close()


def test_nothing_lost_nothing_twice_nothing_torn(survived: tuple[Cluster, Campaign, Verdict]) -> None:
    _, campaign, verdict = survived
    assert verdict.problems == [], f"seed {SEED}: {verdict.problems}"
    assert verdict.figures["lost"] == verdict.figures["trained twice"] == 0
    notes = [json.loads(line)["notes"] for line in (campaign.cluster.folder / "kills.jsonl").read_text().splitlines()]
    assert len(notes) == len(campaign.plan) > KILLS
    met = set(notes[KILLS // 2 - 1]) | set(notes[-1])
    proof = {"killed at its point", "found torn weights", "rolled back", "the canary took the weights back"}
    assert proof <= met, "the campaign proved little"
    assert all(verdict.figures[name] for name in ("dropped", "rollbacks", "rehearsed"))
    assert not any("never reached" in note for note in met)


def test_the_audit_notices(survived: tuple[Cluster, Campaign, Verdict]) -> None:
    """Last: what it looks at is changed here."""
    cluster, campaign, _ = survived
    store, last = cluster.redis, max(campaign.manifests.all)
    update = next(v for v in range(last, 0, -1) if campaign.manifests.all[v]["kind"] == "update")
    out = next(id for id, version in Model(campaign.manifests.all).dropped.items() if version < update)
    stranger = next(iter(campaign.manifests.all[update]["jobs"]))
    for change, told in [
        ({"jobs": [out]}, "dropped before"),
        ({"rehearsed": [out]}, "dropped before"),
        ({"rehearsed": [stranger]}, "not in its weights"),
        ({"jobs": campaign.manifests.all[update]["jobs"][:-1]}, "beside what the manifests say"),
    ]:
        manifests = {v: manifest | (change if v == update else {}) for v, manifest in campaign.manifests.all.items()}
        verdict = Verdict()
        check_books(store, manifests, TRANSCRIPTS, verdict)
        assert any(told in problem for problem in verdict.problems), (change, told)
    for spoil, told in [
        (lambda: store.hdel(keys.LEDGER, "t3"), "not in the ledger"),
        (lambda: store.hset(keys.LEDGER, "t3", 10**6), "beside what the manifests say"),
        (lambda: store.hset(keys.DROPPED, "t3", 1), "the dropped ids"),
        (lambda: store.xadd(keys.EVENTS, {"version": 1, "kind": "update"}), "event stream"),
        (lambda: store.hset("rq:job:t5", "status", "queued"), "states of the jobs"),
    ]:
        spoil()
        verdict = Verdict()
        check_books(store, campaign.manifests.all, TRANSCRIPTS, verdict)
        assert any(told in problem for problem in verdict.problems), told
    before = live_digest(cluster)
    next(iter(attach(cluster.run_dir).tensors.values())).view(-1)[7] += 1
    changed = live_digest(cluster)
    assert before["weights"] != changed["weights"] and before["state"] == changed["state"]


def test_the_plan_follows_from_the_seed_and_passes_every_point() -> None:
    assert plan(1, 200) == plan(1, 200) != plan(2, 200)
    points = Counter(kill.point for kill in plan(3, 200) if kill.point)
    assert set(points) == set(fault_injection.POINTS) and max(points.values()) - min(points.values()) <= 1
    whats = Counter(kill.what for kill in plan(3, 200))
    assert set(whats) == {"worker", "server", "redis", "redis+worker", "server+worker", "worker+server"}
    assert min(whats.values()) >= 5
    kinds = {kill.what for kill in plan(3, 20)}
    assert {"worker", "server", "redis"} <= kinds


def test_operations_are_the_plan_with_ways_back_in_between() -> None:
    assert operations(1, 200) == operations(1, 200) != operations(2, 200)
    found = operations(3, 200)
    assert [one for one in found if isinstance(one, Kill)] == plan(3, 200)
    back = [one for one in found if isinstance(one, Rollback)]
    points = Counter(one.point for one in back)
    assert set(points) == {None, "journaled", "restoring", "restored"} and points[None] >= 10
    assert {one.requeue for one in back} == {True, False} and {one.drop for one in back} == {0, 1, 2}
    assert Counter(isinstance(one, CanaryFails) for one in found)[True] == 8
    assert {type(one) for one in operations(SEED, KILLS)} == {Kill, Rollback, CanaryFails}


def test_transcripts_are_sound_and_follow_from_their_number() -> None:
    for number in range(50):
        assert transcript(number) == transcript(number)
        assert Transcript.from_dict(transcript(number)).id == f"t{number}"
    assert len({json.dumps(transcript(number)) for number in range(50)}) == 50


def test_every_point_is_passed_somewhere_and_no_other_is() -> None:
    sources = [path.read_text() for path in Path(fault_injection.__file__).parents[1].rglob("*.py")]
    placed = {name for source in sources for name in re.findall(r"^ +point\(\"(\w+)\"\)", source, re.MULTILINE)}
    assert placed == set(fault_injection.POINTS)


@pytest.mark.parametrize("setting", ["nowhere", "paused:0", "paused:x", "paused:-1", ":1"])
def test_a_fault_that_cannot_be_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="TANDEM_FAULT"):
        fault_injection.arm(setting)
    fault_injection.arm(None)
    fault_injection.point("paused")  # disarmed: this process lives on
