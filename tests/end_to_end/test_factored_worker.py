"""A server and a worker of the factored rule: from the flag to the journal and back, whichever way updates are applied.

Redis and the worker are real; the server is the stand-in (tests/helpers/stand_in.py): its memory and sockets are real.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from durable_parts import QUIET, Site

from worker.shared_weights.attach import attach


@pytest.fixture
def site(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    running = Site(tmp_path, tiny_model, optimizer="factored")
    yield running
    running.close()


@pytest.fixture(scope="module")
def burst(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Weights, optimizer's state and step count after two versions of two transcripts each, by bursts."""
    site = Site(tmp_path_factory.mktemp("burst"), tiny_model, optimizer="factored")
    site.send("x", 4)
    site.work(*QUIET)
    assert site.agree() == 2 and site.manifest(2)["optimizer"] == "factored"
    yield site.everything()
    site.close()


def test_killed_replayed_and_rolled_back(site: Site, burst: tuple[str, int]) -> None:
    """Every version comes back bit for bit: from the journal after a kill in a write, and from a checkpoint."""
    site.send("x", 2)
    site.work(*QUIET, jobs=2)
    first = site.digest()
    site.send("y", 2)
    site.killed("applying", *QUIET)
    site.is_torn()
    site.work("--checkpoint-every", "1")
    second = site.everything()
    assert site.agree() == 2 and second[1] == 2
    site.recover()
    assert site.everything() == second, "from a checkpoint"
    site.recover(from_journal=True)
    assert site.everything() == second, "from the journal alone"
    site.tandem("rollback", "1")
    assert site.digest() == first
    assert "optimizer factored" in site.tandem("status", code=1)


@pytest.mark.parametrize("way", ["streaming", "factors"])
def test_every_way_makes_the_weights_of_a_burst(site: Site, burst: tuple[str, int], way: str) -> None:
    site.send("x", 4)
    site.work(*QUIET, "--apply", way, "--optimizer", "factored")
    assert site.agree() == 2 and site.everything() == burst and site.manifest(2)["way"] == way


def test_another_optimizer_is_refused_in_one_sentence(site: Site) -> None:
    site.send("x", 2)
    said = site.work(*QUIET, "--optimizer", "apollo-mini", code=1)
    assert "error: --optimizer apollo-mini: the server was started for factored" in said and "Traceback" not in said
    said = site.work(*QUIET, "--scale", "128", code=1)
    assert "error: --scale is APOLLO's: leave it out with --optimizer factored" in said
    site.work(*QUIET)
    digest = site.digest()
    site.optimizer = "apollo-mini"
    site.restart_server()
    fresh = site.digest()
    said = site.work(*QUIET, code=1)
    assert "it was trained with the optimizer factored, and this server was started for apollo-mini" in said
    assert "tandem serve --optimizer factored" in said and "Traceback" not in said
    assert site.digest() == fresh and not attach(site.run_dir).state.any(), "nothing was changed"
    site.optimizer = "factored"
    site.restart_server()
    site.work(*QUIET)
    assert site.digest() == digest
