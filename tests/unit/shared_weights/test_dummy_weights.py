"""A server whose weights came from no files (--load-format dummy): trained like any, never in a checkpoint.

The worker and Redis are real, the server is the stand-in.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from durable_parts import Site


@pytest.fixture
def site(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    running = Site(tmp_path / "site", model)
    yield running
    running.close()


def test_it_is_said_once_that_there_are_no_checkpoints(site: Site) -> None:
    site.send("x", 4)
    said = site.work("--checkpoint-every", "1")
    assert said.count("no checkpoints") == 1 and "could not be written" not in said, said
    assert site.agree() == 2 and not list((site.state / "checkpoints").iterdir())
    site.send("y", 1)
    said = site.work("--state-dir", str(site.folder / "another"))  # which knows nothing of these weights
    assert site.agree() == 3 and "no checkpoints" in said, said
    refused = site.tandem("rollback", "1", code=1)
    assert "nobody can restore" in refused and site.agree() == 3, refused


def test_torn_weights_are_refused_with_the_way_out(site: Site) -> None:
    sent = site.send("x", 2)
    site.killed("swept")
    site.is_torn()
    for more in ([], ["--new-lineage"]):
        said = site.work(*more, code=1)
        assert "nobody can restore" in said and "restart the server" in said and "--new-lineage" in said, said
        assert site.served()["state"] == "torn" and site.header()["state"] == "APPLYING"
    site.restart_server()
    site.work("--new-lineage")
    assert site.agree() == 1 and sorted(site.trained()) == sent, "the transcripts were still queued"
