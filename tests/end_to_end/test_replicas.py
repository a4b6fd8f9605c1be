"""Two and three workers that train as one, each on a server of its own (the stand-in); whoever is killed, whenever."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from replica_parts import FleetSite, feedback

from worker.utils.fault_injection import UPDATE_POINTS

TOLD = ("applying", "swept", "applied", "resumed")
"""Points that a replica passes when replica 0 has said that the version will be made."""


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[FleetSite]:
    site = FleetSite(tmp_path, tiny_model)
    yield site
    site.close()


def send_kinds(site: FleetSite, count: int) -> list[str]:
    sent = feedback(count)
    for item in sent:
        site.producer.enqueue(**item)
    return [item["id"] for item in sent]


def test_two_replicas_are_one_worker_and_each_is_restored_from_its_own_disk(site: FleetSite) -> None:
    """All kinds of feedback; then each replica's state directory alone makes the same weights again, in one process."""
    sent = send_kinds(site, 9)
    assert "replicas 0, 1 of 2 train together" in site.together()
    version = site.all_agree()
    assert version == 3 and sorted(site.trained()) == sorted(sent)
    assert all(site.manifest(v)["replicas"] == "2" for v in range(1, version + 1))
    before = site.standing(0)
    for state in (site.state, site.state_of(1)):
        site.restart_server()
        site.work("--state-dir", str(state), "--no-checkpoint-at-stop")
        assert site.standing(0) == before, "weights, optimizer's state, version and lineage"


def check_killed_follower(site: FleetSite, point: str) -> None:
    """Replica 0 ends its batch alone; the other one, started again, gets its weights."""
    sent = site.send(f"f-{point}", 3)
    other = site.follow(1, fault=point)
    said = site.lead()
    assert other.ended() == -signal.SIGKILL, other.said()
    assert "a replica was lost" in said and set(sent) <= set(site.trained())
    version = site.agree()
    assert (site.manifest(version).get("replicas") == "2") == (point in TOLD)
    site.together()
    assert site.all_agree() == version
    assert len(site.trained()) == len(set(site.trained()))


def check_killed_leader(site: FleetSite, point: str) -> None:
    """The other one puts back what was not written, and waits for the next replica 0."""
    sent = site.send(f"l-{point}", 3)
    other = site.follow(1)
    site.lead_killed(point)
    said = site.lead()
    assert other.ended() == 0, other.said()
    assert "replicas 0, 1 of 2 train together" in said
    site.all_agree()
    assert set(sent) <= set(site.trained()) and len(site.trained()) == len(set(site.trained()))


def test_a_killed_replica_is_brought_back_to_the_weights_of_replica_0(site: FleetSite) -> None:
    check_killed_follower(site, "paused")
    check_killed_leader(site, "swept")


@pytest.mark.slow
@pytest.mark.parametrize("point", UPDATE_POINTS[:-1])
def test_a_replica_killed_at_any_point(site: FleetSite, point: str) -> None:
    check_killed_follower(site, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", UPDATE_POINTS)
def test_replica_0_killed_at_any_point(site: FleetSite, point: str) -> None:
    check_killed_leader(site, point)
