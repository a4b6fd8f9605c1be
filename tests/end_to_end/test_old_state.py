"""A state directory of the first days, with its Redis: read by all that reads one today. One of days to come: refused,
in one sentence that names the file, its format and what to do, and left as it is."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from durable_parts import QUIET, Site

from worker.checkpoint import record_file
from worker.cli import doctor
from worker.cli.doctor_sentences import line
from worker.operations.doctor.state_checks import check_formats

KEPT = Path(__file__).parents[1] / "data" / "old_state"
EXPECTED = json.loads((KEPT / "expected.json").read_text())
SENTENCE = "and this Tandem reads format"


def unpack(folder: Path, model: Path) -> Path:
    """The state directory, whole again, in `folder`."""
    with tarfile.open(KEPT / "state.tar.xz") as archive:
        archive.extractall(folder, filter="tar")
    weights = folder / "state" / "checkpoints" / "2" / "model.safetensors"
    pairs = zip(weights.read_bytes(), (model / weights.name).read_bytes(), strict=True)
    weights.write_bytes(bytes(a ^ b for a, b in pairs))
    return folder / "state"


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server that was started anew, at version 0, beside what the first Tandem left."""
    folder = tmp_path_factory.mktemp("site")
    unpack(folder, tiny_model)
    running = Site(folder, tiny_model)
    for key, value in EXPECTED["redis"].items():
        if isinstance(value, str):
            running.redis.set(key, value)
        elif isinstance(value, dict):
            running.redis.hset(key, mapping=value)
        else:
            for entry in value:
                running.redis.xadd(key, entry)
    yield running
    running.close()


def examined(url: str, run_dir: Path, state: Path) -> dict[str, Any]:
    options = ["--redis", url, "--run-dir", str(run_dir), "--state-dir", str(state), "--json"]
    findings = json.loads(CliRunner().invoke(doctor.command, options).output)["findings"]
    return {one["check"]: one for one in findings}


def test_doctor_reads_it(site: Site) -> None:
    found = examined(site.store.url, site.run_dir, site.state)
    assert found["formats"]["level"] == found["state directory"]["level"] == "ok", found
    assert found["formats"]["values"] == {"files": 4}


def test_doctor_says_of_which_model_it_is_not(site: Site, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"another")
    found = check_formats(site.state, tmp_path)
    assert found.level == "fault" and line(found).endswith("another directory with --state-dir")


def test_log_reads_it_with_and_without_redis(site: Site) -> None:
    for url in (site.store.url, "redis://127.0.0.1:1/0"):
        said = site.tandem("log", "--redis", url, "--json")
        versions = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert [one["version"] for one in versions] == [5, 4, 3, 2, 1]
        assert versions[1]["kind"] == "rollback" and versions[3]["checkpoint"] and versions[4]["jobs"] == ["a-0", "a-1"]


def test_a_worker_goes_on_from_it(site: Site) -> None:
    said = site.work(*QUIET)
    assert "from the checkpoint of version 2 and 2 journaled batches" in said
    assert site.agree() == 5
    assert site.ledger() == {name: int(version) for name, version in EXPECTED["redis"]["weights:ledger"].items()}
    site.send("new", 2)
    site.work(*QUIET)
    assert site.agree() == 6


def test_a_rollback_to_its_checkpoint_gives_the_weights_of_then(site: Site) -> None:
    """To the bit, on every machine: nothing is computed. The optimizer's state too."""
    site.tandem("rollback", "2")
    assert site.agree() == 7
    then = EXPECTED["versions"]["2"]
    assert site.digest() == then["digest"] and site.everything() == (then["everything"], then["step"])


def _newer(path: Path, kind: str) -> None:
    """Raise the format that the first record of `kind` in `path` says, as a Tandem of days to come would."""
    found = [record for _, record in record_file.scan(path, last=False).records]
    next(record for record in found if record["kind"] == kind)["format"] = 9
    path.write_bytes(b"".join(record_file.pack(record) for record in found))


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("journal/00000001.journal", "segment"),
        ("journal/00000003.journal", "update"),
        ("checkpoints/2/tandem/meta.msgpack", "checkpoint"),
    ],
)
def test_what_a_later_tandem_wrote_is_refused_in_one_sentence(site: Site, tmp_path: Path, file: str, kind: str) -> None:
    state = unpack(tmp_path, site.model)
    _newer(state / file, kind)
    before = {path: path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file()}
    found = examined(site.store.url, site.run_dir, state)["formats"]
    assert found["level"] == "fault" and SENTENCE in found["what"] and str(state) in found["what"]
    commands: list[tuple[str, ...]] = [("worker", "--until-empty"), ("rollback", "2")]
    for command in commands if kind == "update" else commands[:1]:
        said = site.tandem(*command, "--state-dir", str(state), code=1)
        (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert str(state) in sentence and "has format 9" in sentence and SENTENCE in sentence
        assert sentence.endswith("with --state-dir, in which the history begins anew")
    if kind != "checkpoint":
        said = site.tandem("log", "--redis", "redis://127.0.0.1:1/0", "--state-dir", str(state), code=1)
        assert "has format 9" in said
    after = {path: path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file() and path.name != "lock"}
    assert after == before, "nothing was read, cut or deleted"
