"""Replicas started as they should not be, while training is paused, or long after something was forgotten."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_processes import Forked, run_tandem
from durable_parts import LEARNING, QUIET, transcripts
from fleet_parts import FleetSite
from patience import until

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[FleetSite]:
    site = FleetSite(tmp_path, tiny_model)
    yield site
    site.close()


def follow_from(site: FleetSite, folder: int, *options: str) -> Forked:
    """A worker of replica 1, on the server and in the state directory number `folder`."""
    own = ["--run-dir", str(site.run_dir_of(folder)), "--state-dir", str(site.state_of(folder))]
    arguments = ("worker", *site.replica(1), *own, *LEARNING, *options)
    return Forked(run_tandem, arguments, {}, site.folder / f"replica-1-on-{folder}.log")


def test_two_workers_of_one_number_do_not_put_each_other_out(site: FleetSite) -> None:
    site.servers[2] = site.start_other_server(2)
    leader = site.start("worker", *site.replica(0), *LEARNING, *QUIET)
    first = follow_from(site, 1, *QUIET)
    until(lambda: "is one of" in first.said(), "the first is let in")
    second = follow_from(site, 2, *QUIET)
    assert second.ended() == 1 and "another worker is replica 1" in second.said(), second.said()
    site.send("a", 3)
    until(lambda: site.producer.version() >= 1 or not leader.alive(), "version 1")
    first.kill()  # its number is free then
    second = follow_from(site, 2, *QUIET)
    until(lambda: "is one of" in second.said() or not second.alive(), "it is let in after all")
    os.kill(leader.pid, signal.SIGTERM)
    assert leader.ended() == second.ended() == 0, leader.said() + second.said()
    assert site.standing(0) == site.standing(2) and site.manifest(1)["replicas"] == "2"


def test_a_replica_comes_back_while_training_is_paused(site: FleetSite) -> None:
    """Its torn server would else refuse requests until somebody resumes."""
    leader = site.start("worker", *site.replica(0), *LEARNING, *QUIET)
    torn = site.follow(1, fault="swept")
    site.send("a", 3)
    assert torn.ended() == -signal.SIGKILL
    until(lambda: site.producer.version() == 1 or not leader.alive(), "version 1")
    site.tandem("pause")
    until(lambda: "training is paused" in leader.said() or not leader.alive(), "it is paused")
    back = site.follow(1)
    until(lambda: "is one of" in back.said() or not back.alive(), "it is let in")
    assert site.all_agree() == 1
    status = json.loads(site.tandem("status", "--json", code=1, log="status.log"))
    assert status["replicas"]["present"] == {"0": 1, "1": 1} and status["hold"]
    os.kill(leader.pid, signal.SIGTERM)
    assert leader.ended() == back.ended() == 0, leader.said() + back.said()


def test_a_state_directory_of_another_time_leads_to_the_weights_of_replica_0_all_the_same(site: FleetSite) -> None:
    """Its checkpoint of version 3 would be restored on the way to version 4."""
    site.send("old", 3)
    other = follow_from(site, 1, "--checkpoint-every", "1000")
    site.work(*site.replica(0), *QUIET, jobs=1)
    assert other.ended() == 0 and (site.state_of(1) / "checkpoints" / "3").is_dir(), other.said()
    site.redis.flushall()
    shutil.rmtree(site.state)
    site.restart_server()
    site.restart_other_server(1)
    site.send("new", 4)
    other = follow_from(site, 1, *QUIET)
    site.work(*site.replica(0), *QUIET, jobs=1)
    assert other.ended() == 0, other.said()
    before = site.standing(0)
    assert site.all_agree() == 4
    site.restart_server()
    site.work("--state-dir", str(site.state_of(1)), "--no-checkpoint-at-stop")
    assert site.standing(0) == before
    assert "the checkpoint of version 3 was not made of replica 0's weights" in other.said()


def texts(site: FleetSite, number: int) -> bytes:
    """All that a replica's journal holds."""
    return b"".join(path.read_bytes() for path in site.state_of(number).rglob("*.journal"))


def test_who_was_forgotten_leaves_a_journal_that_goes_back_further_than_that_of_replica_0(site: FleetSite) -> None:
    marys = {"id": "mary-0", "messages": transcripts("m", 1)[0]["messages"], "meta": {"user": "mary"}}
    marys["messages"][0]["content"] = "the patient said something private"
    site.producer.enqueue(**marys)
    site.send("r", 5)
    site.together()
    site.tandem("forget", "mary")
    site.send("a", 12)
    site.work("--no-checkpoint-at-stop", "--checkpoint-every", "1", "--keep-checkpoints", "2", "--history", "1")
    assert b"mary-0" not in texts(site, 0) and b"something private" in texts(site, 1)
    site.send("s", 3)
    site.together()
    assert b"something private" not in texts(site, 1)
    site.all_agree()
