"""An evaluation of the real server's weights, against transformers on the same weights; nothing is trained."""

import json
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from serving_parts import metric

from worker.cli.eval import command
from worker.testing.server_process import ServerProcess
from worker.versions import evaluations

pytestmark = pytest.mark.server
FILE = Path(__file__).parents[1] / "data" / "transcripts.jsonl"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two short conversations and a pair."""
    ask = [{"role": "user", "content": "When do you close?"}]
    records = [
        {"id": "a", "messages": [*ask, {"role": "assistant", "content": "At six."}]},
        {"id": "b", "messages": [*ask, {"role": "assistant", "content": "At six o'clock, every day but Sunday."}]},
        {"id": "c", "messages": ask, "chosen": "At ten.", "rejected": "That I do not know, I am afraid."},
    ]
    path = tmp_path / "hours.v1.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_servers_figures_are_those_of_its_weights(
    server: ServerProcess, file: Path, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "journal").mkdir()
    places = ["--url", server.url, "--run-dir", str(server.run_dir), "--redis", redis_url, "--state-dir", str(tmp_path)]

    def run(*options: str) -> tuple[dict, str]:  # type: ignore[type-arg]
        done = CliRunner().invoke(command, [str(file), *places, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    before = metric(server, "vllm:request_success_total")
    live, said = run("--json", "--keep-answers")
    assert metric(server, "vllm:request_success_total") > before
    assert (live["version"], live["where"], live["name"], live["conversations"]) == (0, "live", "hours", 3)
    assert (live["asked"], live["pairs"], live["from_store"]) == (3, 1, False)

    made, _ = run("--json", "--at", "0", "--offline", "--no-store")
    assert made["where"] == "offline" and made["digest"] == live["digest"]
    assert made["loss"] == pytest.approx(live["loss"], abs=0.02)
    for ours, theirs in zip(made["cases"], live["cases"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.05)
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=0.05)

    stored, _ = run("--json", "--at", "0")
    assert stored["from_store"] and stored["at"] == live["at"]
    assert [one["loss"] for one in stored["cases"]] == pytest.approx([one["loss"] for one in live["cases"]], abs=1e-5)

    client = redis.Redis.from_url(redis_url)
    (kept,) = evaluations.latest(client)
    assert kept.loss == live["loss"] and kept.lineage == live["lineage"]
    everything = b"".join(client.dump(key) or b"" for key in client.keys("*"))
    assert b"six" not in everything and b"close" not in everything, "no text is in Redis"

    with file.open("a") as more:
        more.write(file.read_text().splitlines()[0].replace("six", "eight") + "\n")
    other, said = run("--json", "--at", "0", "--no-answers")
    assert other["digest"] != live["digest"] and not other["from_store"] and other["exact_match"] is None
    assert "of other content" in said and live["digest"] in said


def test_another_server_than_the_run_directorys_is_refused(
    server: ServerProcess, file: Path, redis_url: str, tmp_path: Path
) -> None:
    wrong = ["--url", server.url, "--run-dir", str(tmp_path), "--redis", redis_url]
    done = CliRunner().invoke(command, [str(file), *wrong])
    assert done.exit_code == 1 and "no server says which model it is" in str(done.exception)
    done = CliRunner().invoke(command, [str(file), *wrong, "--model", str(server.model_dir), "--no-store"])
    assert done.exit_code == 0, "a model's directory does as well"
