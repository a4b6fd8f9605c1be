"""Versions that are not live any more, made again and evaluated beside a worker: right, and nothing is disturbed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from durable_parts import QUIET, Site, transcripts
from patience import until
from transformers import AutoTokenizer

from worker.checkpoint import replay
from worker.checkpoint.visit import make_version, private_weights, visit
from worker.cli import diff
from worker.cli import eval as evaluation
from worker.operations.evaluation import offline
from worker.shared_weights.attach import attach
from worker.shared_weights.bind import build_model
from worker.versions import evaluations

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Versions 1 to 4 of two transcripts each, x-0 and x-1, x-2 and x-3, ...; a checkpoint of version 3."""
    site = Site(tmp_path_factory.mktemp("site"), tiny_model)
    site.send("x", 6)
    site.work("--checkpoint-every", "1000")
    site.send("x", 8)
    site.work(*QUIET)
    assert site.agree() == 4
    yield site
    site.close()


def run(site: Site, file: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """`tandem eval FILE ... --json`: what it printed, and what it said beside."""
    places = ["--url", NOWHERE, "--run-dir", str(site.run_dir), "--redis", site.store.url]
    done = CliRunner().invoke(
        evaluation.command, [str(file), *places, "--state-dir", str(site.state), *options, "--json"]
    )
    assert done.exit_code == code, (done.output, done.exception)
    return (json.loads(done.stdout) if code == 0 else {}), done.stderr or str(done.exception)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, with its digest; what `tandem eval --keep-answers` writes left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "evaluations" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_version_made_again_has_the_weights_that_were_live(taught: Site, version: int) -> None:
    with visit(taught.state, taught.model) as history:
        weights = private_weights(history, taught.model, version)
        model = build_model(taught.model, weights.tensors)
        threads = torch.get_num_threads()
        rebuilt = make_version(history, weights, model, AutoTokenizer.from_pretrained(taught.model), version)
    assert rebuilt.plan.base == (3 if version >= 3 else 0) and torch.get_num_threads() == threads
    assert replay.digest(weights.tensors) == taught.manifest(version)["digest"]


def test_a_loss_is_the_one_that_training_saw(taught: Site, tmp_path: Path) -> None:
    """Version 2's loss of version 3's batch is what version 3 was trained from."""
    file = write(tmp_path / "batch.jsonl", transcripts("x", 6)[4:])
    before = contents(taught.state)
    found, said = run(taught, file, "--at", "2", "--keep-answers")
    assert (found["version"], found["where"], found["lineage"]) == (2, "offline", taught.header()["lineage"])
    assert found["loss"] == pytest.approx(float(taught.manifest(3)["loss"]), abs=1e-4)
    assert f"{NOWHERE} cannot be asked" in said
    run(taught, file, "--at", "2", "--no-answers", "--offline")
    stored, _ = run(taught, file, "--at", "2")
    assert stored["from_store"] and stored["asked"] == 2, "what has answers is not replaced by what has none"
    assert contents(taught.state) == before, "nothing of the worker's was changed"
    (kept,) = (taught.state / "evaluations" / "batch").iterdir()
    assert kept.name == f"2-{found['lineage']}.jsonl" and "Its number is 28." in kept.read_text()
    assert taught.agree() == 4


def test_before_and_after_is_what_the_two_are_alone(taught: Site, tmp_path: Path) -> None:
    file = write(tmp_path / "both.jsonl", transcripts("x", 8))
    compared, _ = run(taught, file, "--compare", "0", "4", "--no-answers")
    alone = [run(taught, file, "--at", version, "--no-answers")[0] for version in ("0", "4")]
    assert [one["from_store"] for one in alone] == [True, True], "comparing has stored both"
    loss = compared["difference"]["loss"]
    assert [loss["before"], loss["after"]] == pytest.approx([one["loss"] for one in alone])
    assert loss["after"] < loss["before"] and compared["better"] == 8
    low, high = loss["interval"]
    assert low <= loss["change"] <= high < 0
    again, _ = run(taught, file, "--compare", "0", "4", "--no-answers")
    assert again["difference"]["loss"]["interval"] == pytest.approx([low, high], abs=1e-5), "from what is stored"
    history, _ = run(taught, file, "--at", "4", "--no-answers", "--history")
    assert [one["version"] for one in history["history"]] == [0, 4]


def test_a_file_that_changed_is_not_compared_with_its_former_figures(taught: Site, tmp_path: Path) -> None:
    file = write(tmp_path / "moving.jsonl", transcripts("x", 2))
    first, _ = run(taught, file, "--at", "3", "--no-answers")
    write(file, transcripts("x", 3))
    second, said = run(taught, file, "--at", "3", "--no-answers")
    assert first["digest"] != second["digest"] and not second["from_store"] and second["conversations"] == 3
    assert f"is of other content (digest {first['digest']}, the file's is {second['digest']})" in said


def test_a_worker_that_holds_its_locks_does_not_stop_it(taught: Site, tmp_path: Path) -> None:
    """The state directory's lock and the queue's are the worker's; half a checkpoint is for it to remove, or to end."""
    former, half = taught.state / "checkpoints" / ".8.half", taught.state / "checkpoints" / ".9.half"
    former.mkdir()
    worker = taught.start("worker", "--max-length", "512", "--threads", "1", *QUIET)
    try:
        until(lambda: not former.exists() or not worker.alive(), "the worker has opened the state directory")
        half.mkdir()
        file = write(tmp_path / "beside.jsonl", transcripts("x", 2))
        found, _ = run(taught, file, "--at", "1", "--no-store", "--no-answers")
        assert found["version"] == 1 and worker.alive() and half.exists()
        assert (taught.state / "lock").read_text() == f"{worker.pid}\n" and taught.redis.exists("weights:worker")
    finally:
        worker.kill()
    assert evaluations.find(taught.redis, "beside", 1, found["lineage"]) is None, "--no-store"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--at", "99"], "the state directory does not know version 99: it knows versions up to 4"),
        (["--at", "1", "--compare", "1", "2"], "name one of them"),
        (["--offline"], "--offline is for --at VERSION"),
        (["--at", "1", "--keep-answers", "--no-answers"], "leave out --no-answers"),
        ([], "cannot be asked"),
        (["--at", "1", "--name", "a b"], "cannot be the name of a set"),
        (["--at", "1", "--redis", "redis://127.0.0.1:1"], "127.0.0.1:1"),
        (["--at", "1", "--state-dir", "/nowhere/at/all"], "/nowhere/at/all is no state directory"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(taught: Site, tmp_path: Path, options: list[str], says: str) -> None:
    file = write(tmp_path / "set.jsonl", transcripts("x", 1))
    _, said = run(taught, file, *options, code=1)
    assert says in said and "Traceback" not in said


def test_what_does_not_fit_into_memory_is_refused_first(
    taught: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_available", lambda: 1_000_000)
    file = write(tmp_path / "set.jsonl", transcripts("x", 1))
    _, said = run(taught, file, "--at", "1", code=1)
    assert "GB are needed" in said and "evaluate versions while they are live" in said


def difference(site: Site, *options: str) -> str:
    """What `tandem diff` prints."""
    places = ["--run-dir", str(site.run_dir), "--state-dir", str(site.state)]
    done = CliRunner().invoke(diff.command, [*options, *places], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_was_trained_between_two_versions_and_how_far_each_layer_moved(taught: Site) -> None:
    before = contents(taught.state)
    found = json.loads(difference(taught, "2", "4", "--weights", "--json"))
    assert [one["jobs"] for one in found["versions"]] == [["x-4", "x-5"], ["x-6", "x-7"]]
    assert [one["loss"] for one in found["versions"]] == [float(taught.manifest(v)["loss"]) for v in (3, 4)]
    assert found["kinds"] == {"demonstration": 4} and found["removed"] == []
    layers = {one["layer"] for one in found["weights"] if one["layer"] is not None}
    config = json.loads((taught.model / "config.json").read_text())
    assert layers == set(range(config.get("text_config", config)["num_hidden_layers"]))
    assert all(0 < one["relative"] < 1 for one in found["weights"] if one["part"] in ("attention", "mlp"))
    assert sum(one["elements"] for one in found["weights"]) == sum(
        tensor.numel() for tensor in attach(taught.run_dir).tensors.values()
    )
    same = json.loads(difference(taught, "3", "3", "--weights", "--json"))
    assert same["versions"] == [] and {one["change"] for one in same["weights"]} == {0.0}
    assert contents(taught.state) == before


def test_kept_answers_are_shown_side_by_side(taught: Site, tmp_path: Path) -> None:
    file = write(tmp_path / "sides.jsonl", transcripts("x", 2))
    for version in ("0", "4"):
        run(taught, file, "--at", version, "--keep-answers", "--no-store")
    plain = json.loads(difference(taught, "0", "4", "--set", "sides", "--json"))
    (first, *_) = plain["answers"]
    assert json.loads(difference(taught, "4", "4", "--set", "sides", "--json"))["answers"] == [], "they are the same"
    assert first["set"] == "sides" and first["before"]["answer"] != first["after"]["answer"]
    text = difference(taught, "0", "4", "--set", "sides")
    assert "version 0 -> 4: " in text and "sides line 1 x-0: What is the number of x 0?" in text
    assert "wanted: Its number is 0." in text and "\x1b" not in text
    assert "sides" not in difference(taught, "0", "3") and "sides" not in difference(taught, "0", "4", "--no-answers")


def test_a_rollback_takes_versions_out_and_what_was_dropped_is_not_in_an_older_one(
    taught: Site, tmp_path: Path
) -> None:
    """The last test of this module: the live version is another one after it."""
    taught.tandem("rollback", "2", "--drop", "x-0")
    found, said = run(taught, write(tmp_path / "later.jsonl", transcripts("x", 2)), "--at", "1", "--no-answers")
    assert "made again without 1 transcripts that were dropped since" in said and found["version"] == 1
    assert evaluations.find(taught.redis, "later", 1, found["lineage"]) is None, "it is not what was live"
    found = json.loads(difference(taught, "4", "5", "--json"))
    assert [one["kind"] for one in found["versions"]] == ["rollback"] and found["removed"] == [3, 4]
    assert "again version 2" in difference(taught, "4", "5")
