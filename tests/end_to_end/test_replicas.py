"""Two and three workers that train as one, each on a server of its own (the stand-in); whoever is killed, whenever."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos_processes import RealServer
from durable_parts import QUIET, transcripts
from fleet_parts import FleetSite, check_killed_follower, check_killed_leader
from patience import PATIENCE, until

from worker.checkpoint.file_digests import fingerprint
from worker.checkpoint.journal import Journal
from worker.checkpoint.records import UpdateRecord
from worker.checkpoint.state_dir import StateDir
from worker.shared_weights.attach import attach
from worker.utils.fault_injection import UPDATE_POINTS
from worker.utils.process_state import is_stopped


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[FleetSite]:
    site = FleetSite(tmp_path, tiny_model)
    yield site
    site.close()


def test_two_replicas_are_one_worker_and_each_is_restored_from_its_own_disk(site: FleetSite) -> None:
    """All kinds of feedback; then each replica's state directory alone makes the same weights again, in one process."""
    sent = site.send_kinds(9)
    assert "replicas 0, 1 of 2 train together" in site.together()
    version = site.all_agree()
    assert version == 3 and sorted(site.trained()) == sorted(sent)
    assert all(site.manifest(v)["replicas"] == "2" for v in range(1, version + 1))
    for number in (0, 1):
        record = journaled(site, number, 1)
        assert (record.format, record.parts) == (5, 2), "an older Tandem, which adds up otherwise, refuses it"
    before = site.standing(0)
    for state in (site.state, site.state_of(1)):
        site.restart_server()
        site.work("--state-dir", str(state), "--no-checkpoint-at-stop")
        assert site.standing(0) == before, "weights, optimizer's state, version and lineage"


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


@pytest.mark.slow
def test_a_version_that_was_streamed_by_half_of_them_is_made_by_the_next_start(site: FleetSite) -> None:
    sent = site.send("s", 3)
    other = site.follow(1, "--apply", "streaming", fault="applying")
    said = site.lead("--apply", "streaming", code=1)
    assert other.ended() == -signal.SIGKILL and "weights are torn" in said
    site.is_torn()
    assert "replicas 0, 1 of 2 train together" in site.together("--apply", "streaming")
    assert site.all_agree() == 1 and sorted(site.trained()) == sorted(sent)
    site.send("t", 6)
    site.together("--apply", "streaming")
    before = site.standing(0)
    assert site.all_agree() == 3 and site.manifest(3)["way"] == "streaming"
    site.restart_server()
    site.work(*QUIET)
    assert site.standing(0) == before


@pytest.mark.slow
def test_a_rollback_and_what_is_forgotten_reach_every_replica(site: FleetSite) -> None:
    marys = {"id": "mary-0", "messages": transcripts("m", 1)[0]["messages"], "meta": {"user": "mary"}}
    marys["messages"][0]["content"] = "the patient said something private"
    site.producer.enqueue(**marys)
    site.send("r", 8)
    site.together()
    assert site.all_agree() == 3 and b"something private" in journal(site, 1)
    site.tandem("rollback", "2", "--drop", "r-0")
    assert site.standing(0) != site.standing(1)
    site.together()
    assert site.all_agree() == 4
    site.tandem("forget", "mary", code=1)  # a checkpoint has her still, and says so
    site.send("s", 3)
    site.together()
    assert site.all_agree() == 6
    assert b"something private" not in journal(site, 0) + journal(site, 1)
    before = site.standing(0)
    site.restart_server()
    site.work("--state-dir", str(site.state_of(1)), "--no-checkpoint-at-stop")
    assert site.standing(0) == before


def journal(site: FleetSite, number: int) -> bytes:
    return b"".join(path.read_bytes() for path in site.state_of(number).rglob("*.journal"))


@pytest.mark.slow
def test_one_that_joins_late_writes_a_checkpoint_where_the_journal_no_longer_goes_back_to_the_start(
    site: FleetSite,
) -> None:
    site.send("a", 12)
    short = ["--checkpoint-every", "1", "--keep-checkpoints", "2", "--history", "1"]
    site.work("--no-checkpoint-at-stop", *short)  # alone: six versions
    assert 1 not in entries(site, 0)
    site.send("b", 3)
    site.together()
    assert site.all_agree() == 7 and not {*entries(site, 1)} - {6, 7}
    before, ledger = site.standing(0), site.ledger()
    site.restart_server()
    site.redis.flushall()
    site.work("--state-dir", str(site.state_of(1)), "--no-checkpoint-at-stop")
    assert site.standing(0) == before and site.ledger() == ledger


@contextmanager
def journal_of(site: FleetSite, number: int) -> Iterator[Journal]:
    with StateDir(site.state_of(number)) as state:
        found = Journal(state.journal, fingerprint(site.model))
        yield found
        found.close()


def entries(site: FleetSite, number: int) -> list[int]:
    """Versions in a replica's journal."""
    with journal_of(site, number) as found:
        return sorted(found.entries)


def journaled(site: FleetSite, number: int, version: int) -> UpdateRecord:
    with journal_of(site, number) as found:
        record = found.read(version)
        assert isinstance(record, UpdateRecord)
        return record


@pytest.mark.slow
def test_weights_that_are_not_equal_are_said_and_made_equal(site: FleetSite) -> None:
    site.send("u", 1)
    site.follow(1)
    leader = site.background()
    site.to_version(1, leader)
    attach(site.run_dir_of(1)).tensors["model.norm.weight"][0] += 1
    site.send("v", 1)
    site.to_version(2, leader)
    site.send("w", 1)
    site.to_version(3, leader)
    status = json.loads(site.tandem("status", "--json", code=1, log="status.log"))
    assert status["replicas"]["unequal"] == 1 and list(status["replicas"]["present"]) == ["0", "1"]
    assert any("replica digest unequal" in problem for problem in status["problems"])
    said = site.stop(leader)
    assert "replica digest unequal: replica 1 has other weights than replica 0 at version 2" in said
    assert site.all_agree() == 3 and site.manifest(3)["replicas"] == "2"


@pytest.mark.slow
def test_servers_redis_and_replicas_that_go_away_under_three(tmp_path: Path, tiny_model: Path) -> None:
    site = FleetSite(tmp_path, tiny_model, 3)
    try:
        sent = site.send("a", 3)
        for number in (1, 2):
            site.follow(number)
        leader = site.background()
        site.to_version(1, leader)
        site.servers[1].kill()  # its worker ends and says so; the others go on
        assert site.followers[1].ended() == 1 and "Start the server again" in site.followers[1].said()
        sent += site.send("b", 3)
        site.to_version(2, leader)
        assert site.manifest(2)["replicas"] == "2"
        site.restart_other_server(1)
        site.follow(1)  # a new server: lineage and weights come from replica 0
        until(lambda: "is one of" in site.followers[1].said(), "it is let in")
        site.store.kill()
        site.store.start()
        sent += site.send("c", 3)
        site.to_version(3, leader)
        assert site.manifest(3)["replicas"] == "3"
        site.stop(leader)
        assert site.all_agree() == 3 and sorted(site.trained()) == sorted(sent)
    finally:
        site.close()


@pytest.mark.slow
def test_one_that_hangs_while_servers_stand_still_is_left_behind_and_comes_back(site: FleetSite) -> None:
    sent = site.send("h", 3)
    other = site.follow(1, fault="paused:1:stop")
    leader = site.background()
    site.to_version(1, leader)
    assert site.manifest(1).get("replicas") is None and sorted(site.trained()) == sorted(sent)
    site.wakes(other, leader)


@pytest.mark.slow
def test_one_that_hangs_does_not_keep_replica_0_from_ending(site: FleetSite) -> None:
    """However long it is waited for in a version."""
    patient = ["--replica-timeout", "1e6"]
    other = site.follow(1, *patient)
    leader = site.background(*patient, fault="committed:1:stop")
    site.send("e", 3)
    until(lambda: is_stopped(leader.pid) or not leader.alive(), "version 1 is made, and replica 0 stopped after it")
    os.kill(other.pid, signal.SIGSTOP)
    for signum in (signal.SIGTERM, signal.SIGCONT):
        os.kill(leader.pid, signum)
    assert leader.ended() == 0 and "replica 1 was lost" in leader.said(), leader.said()
    os.kill(other.pid, signal.SIGCONT)
    until(lambda: other.said().count("asks replica 0 to be let in") == 2, "it waits for the next one")
    os.kill(other.pid, signal.SIGTERM)
    assert other.ended() == 0, other.said()


@pytest.mark.slow
def test_one_with_other_flags_is_refused_and_the_others_go_on(site: FleetSite) -> None:
    site.send("x", 1)
    other = site.follow(1, "--lr", "1e-5")
    assert "replicas 0 of 2 train together from version 0 on; not there: 1" in site.lead("--replica-wait", "20")
    assert other.ended() == 1
    assert "refused by replica 0: --lr is 1e-05 there and 0.0003 here" in other.said()
    assert site.agree() == 1


def says(server: RealServer) -> tuple[str, dict[str, str]]:
    """An answer of a server, and its headers."""
    body = {"model": str(server.process.model_dir), "prompt": "The cat", "max_tokens": 12, "temperature": 0}
    asked = urllib.request.Request(
        f"{server.process.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
        return json.load(reply)["choices"][0]["text"], {name.lower(): value for name, value in reply.headers.items()}


@pytest.mark.slow
@pytest.mark.server
def test_two_real_servers_learn_the_same_and_one_that_was_killed_learns_it_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = FleetSite(tmp_path, tiny_model, real=True)
    try:
        site.send_kinds(6)
        site.together()
        assert site.all_agree() == 2
        answers = [says(server) for server in (site.server, site.servers[1])]
        assert answers[0][0] == answers[1][0]
        assert all(headers["x-weight-version"] == "2" for _, headers in answers)
        site.follow(1)
        leader = site.background("--rolling", fault="resumed:1:stop")  # it hangs when only its own server has version 3
        site.send("a", 3)
        until(lambda: site.served_by(0) == ("serving", 3) or not leader.alive(), "half of a roll")
        assert [says(server)[1]["x-weight-version"] for server in (site.server, site.servers[1])] == ["3", "2"]
        os.kill(leader.pid, signal.SIGCONT)
        site.to_version(3, leader)
        assert [says(server)[1]["x-weight-version"] for server in (site.server, site.servers[1])] == ["3", "3"]
        site.stop(leader)
        site.restart_other_server(1)
        site.send("b", 3)
        site.together()
        assert site.all_agree() == 4 and site.manifest(4)["replicas"] == "2"
        assert says(site.server)[0] == says(site.servers[1])[0]
    finally:
        site.close()
