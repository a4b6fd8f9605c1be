"""`tandem worker --replicas N`: one command starts N workers on one host, which live and end with it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_processes import Forked
from durable_parts import LEARNING, QUIET
from fleet_parts import FleetSite
from patience import PATIENCE, until

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[FleetSite]:
    site = FleetSite(tmp_path, tiny_model)
    (tmp_path / "run-0").symlink_to(site.run_dir)
    yield site
    site.close()


def all_of_them(site: FleetSite, *options: str) -> Forked:
    places = ["--run-dir", f"{site.folder}/run-{{replica}}", "--state-dir", f"{site.folder}/state-{{replica}}"]
    meeting = ["--rendezvous", f"127.0.0.1:{site.port}", "--replica-wait", str(PATIENCE)]
    return site.start("worker", "--replicas", "2", *places, *meeting, *LEARNING, *QUIET, "--max-jobs", "3", *options)


def workers_of(parent: Forked) -> list[int]:
    """Their process ids, replica 0's first."""
    return [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]


def test_one_that_is_stopped_does_not_keep_the_others_from_ending(site: FleetSite) -> None:
    """Nor does a second Ctrl-C leave anything half-written: checkpoints are written, and all agree."""
    sent = site.send("a", 3)
    parent = all_of_them(site, "--checkpoint-at-stop")
    until(lambda: site.producer.version() == 1 or not parent.alive(), "version 1")
    assert parent.alive(), parent.said()
    sent += site.send("b", 30)
    stopped = workers_of(parent)[1]
    os.kill(stopped, signal.SIGSTOP)
    until(lambda: f"replica 1 (process {stopped}) is stopped" in parent.said(), "it is said")
    os.kill(parent.pid, signal.SIGINT)
    until(lambda: "told to stop: replica 0 ends after what it does" in parent.said(), "it is told")
    os.kill(parent.pid, signal.SIGINT)
    assert parent.ended() == 0, parent.said()
    version = site.all_agree()
    assert len(site.trained()) == len(set(site.trained())) and set(site.trained()) <= set(sent)
    for number in (0, 1):
        assert (site.folder / f"state-{number}" / "checkpoints" / str(version)).is_dir(), parent.said()


def test_one_command_starts_them_stops_them_and_they_die_with_it(site: FleetSite) -> None:
    sent = site.send("a", 3)
    parent = all_of_them(site)
    until(lambda: site.producer.version() == 1 or not parent.alive(), "version 1")
    assert parent.alive() and site.manifest(1)["replicas"] == "2", parent.said()

    os.kill(workers_of(parent)[1], signal.SIGKILL)
    until(lambda: "replica 1 ended with -9: the others go on" in parent.said(), "it is said")
    sent += site.send("b", 3)
    until(lambda: site.producer.version() == 2 or not parent.alive(), "version 2")
    os.kill(parent.pid, signal.SIGTERM)
    assert parent.ended() == 0, parent.said()

    sent += site.send("c", 3)
    parent = all_of_them(site)
    until(lambda: site.producer.version() == 3 or not parent.alive(), "version 3")
    assert parent.alive() and site.manifest(3)["replicas"] == "2", parent.said()
    workers = workers_of(parent)
    parent.kill()
    until(lambda: not any(Path(f"/proc/{pid}/fd").exists() for pid in workers), "they have ended, too")
    assert site.all_agree() == 3 and sorted(site.trained()) == sorted(sent)
