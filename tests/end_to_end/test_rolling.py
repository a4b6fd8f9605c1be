"""`--rolling`: replicas pause in turn, so that one always serves; whoever is killed, whenever."""

import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from fleet_parts import FleetSite, check_killed_follower, check_killed_leader

from worker.utils.fault_injection import UPDATE_POINTS

TOLD = UPDATE_POINTS[2:]
"""Points that a replica passes when replica 0 has the version: it has its turn then."""


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[FleetSite]:
    site = FleetSite(tmp_path, tiny_model)
    yield site
    site.close()


def one_always_serves(site: FleetSite) -> bool:
    """Whether no two servers stood still at one moment."""
    still = sorted(one for number in range(site.count) for one in site.still(number))
    return all(end <= start for (_, end), (start, _) in pairwise(still))


def test_servers_stand_still_in_turn_and_a_roll_that_breaks_off_is_mended(site: FleetSite) -> None:
    sent = site.send_kinds(6)
    site.together("--rolling")
    assert site.all_agree() == 2 and site.manifest(2)["replicas"] == "2"
    assert len(site.still(0)) >= 2 and len(site.still(1)) >= 2 and one_always_serves(site)

    sent += site.send("half", 3)
    other = site.follow(1, "--rolling")
    site.lead_killed("resumed", "--rolling")
    assert (site.served_by(0), site.served_by(1)) == (("serving", 3), ("serving", 2))
    assert site.producer.version() == 2, "it is published when all have it"
    site.lead("--rolling")
    assert other.ended() == 0 and site.all_agree() == 3

    check_killed_follower(site, "swept", "--rolling", told=TOLD)
    assert one_always_serves(site)


@pytest.mark.slow
def test_without_it_they_stand_still_together(site: FleetSite) -> None:
    site.send("a", 3)
    site.together()
    assert site.all_agree() == 1 and not one_always_serves(site)


@pytest.mark.slow
@pytest.mark.parametrize("point", UPDATE_POINTS[:-1])
def test_a_replica_killed_at_any_point_of_a_roll(site: FleetSite, point: str) -> None:
    check_killed_follower(site, point, "--rolling", told=TOLD)


@pytest.mark.slow
@pytest.mark.parametrize("point", UPDATE_POINTS)
def test_replica_0_killed_at_any_point_of_a_roll(site: FleetSite, point: str) -> None:
    check_killed_leader(site, point, "--rolling")


@pytest.mark.slow
def test_one_of_three_that_dies_in_its_turn_keeps_the_version_from_nobody(tmp_path: Path, tiny_model: Path) -> None:
    site = FleetSite(tmp_path, tiny_model, 3)
    try:
        sent = site.send("a", 3)
        first, last = site.follow(1, "--rolling", fault="swept"), site.follow(2, "--rolling")
        site.lead("--rolling")
        assert first.ended() == -signal.SIGKILL and last.ended() == 0, last.said()
        assert site.agree() == 1 and site.manifest(1)["replicas"] == "3"
        assert site.standing(2) == site.standing(0)
        assert "version 1 of lineage" not in last.said(), "it made the version itself"
        site.together("--rolling")
        assert site.all_agree() == 1 and sorted(site.trained()) == sorted(sent)
    finally:
        site.close()


@pytest.mark.slow
def test_one_that_hangs_in_its_turn_is_left_behind_and_comes_back(site: FleetSite) -> None:
    sent = site.send("h", 3)
    other = site.follow(1, "--rolling", "--replica-timeout", "30", fault="paused:1:stop")
    leader = site.background("--rolling", "--replica-timeout", "30")
    site.to_version(1, leader)
    assert site.served_by(0) == ("serving", 1) and sorted(site.trained()) == sorted(sent)
    site.wakes(other, leader)


@pytest.mark.slow
def test_by_factors_as_well(site: FleetSite) -> None:
    site.send("a", 3)
    site.together("--rolling", "--apply", "factors")
    assert site.all_agree() == 1 and site.manifest(1)["way"] == "factors" and one_always_serves(site)
