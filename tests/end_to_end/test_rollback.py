"""Going back: each of the last versions bit for bit, without transcripts if asked, and what becomes of the rest."""

import json
from pathlib import Path
from typing import Any

import pytest
import redis
from chaos_processes import Forked
from durable_parts import LEARNING, QUIET, Site, transcripts
from patience import until

from producer import Producer, keys
from worker.web.app import make_app

SLOW = pytest.mark.slow
"""What repeats the guarding tests at greater length."""

VERSIONS = 54


def go_back_to_all(redis_url: str, run_dir: str, state: str, answers: str) -> None:
    """In a process of its own: roll back to each of the last fifty versions, and write down what was live then."""
    import torch

    from worker.checkpoint import replay
    from worker.config.hyperparameters import Hyperparameters
    from worker.config.retention import Policy
    from worker.orchestrator.agreement import agree
    from worker.orchestrator.rollback import roll_back
    from worker.orchestrator.session import open_session
    from worker.versions import ledger

    torch.set_num_threads(1)
    connection = redis.Redis.from_url(redis_url)
    policy, known, seen = Policy(keep=100, every=5), ledger.state(connection), {}
    with open_session(
        Path(run_dir), "all", Hyperparameters(), state_dir=Path(state), policy=policy, known=known
    ) as session:
        agree(connection, session)
        for version in range(VERSIONS - 1, VERSIONS - 51, -1):
            roll_back(connection, session, version)
            assert session.trainer.optimizer.step_count == version
            seen[version] = replay.digest(session.weights.tensors)
    Path(answers).write_text(json.dumps(seen))


@SLOW
def test_each_of_the_last_fifty_versions_comes_back_bit_for_bit(site: Site) -> None:
    site.send("v", VERSIONS)
    site.work(*LEARNING, "--keep-checkpoints", "20", "--checkpoint-every", "9", jobs=1)
    assert site.agree() == VERSIONS
    then = {version: site.manifest(version)["digest"] for version in range(1, VERSIONS)}
    assert len(set(then.values())) == VERSIONS - 1, "or a digest says nothing"
    answers = site.folder / "answers.json"
    arguments = (site.store.url, str(site.run_dir), str(site.state), str(answers))
    process = Forked(go_back_to_all, arguments, {}, site.folder / "all.log")
    assert process.ended(280) == 0, process.said()
    seen = {int(version): digest for version, digest in json.loads(answers.read_text()).items()}
    assert len(seen) == 50 and seen == {version: then[version] for version in seen}
    assert site.agree() == VERSIONS + 50


def test_a_rollback_is_a_new_version_that_says_what_it_is(taught: Site) -> None:
    was, ledger = taught.manifest(2)["digest"], taught.ledger()
    said = taught.tandem("rollback", "2", "--reason", "sounds odd")
    assert (
        "the weights of version 2 are bit for bit what they were" in said
        and "version 5 is live: it is version 2" in said
    )
    assert "4 transcripts of 2 later versions are no longer in the weights" in said
    assert taught.agree() == 5 and taught.digest() == was
    manifest = taught.manifest(5)
    assert (manifest["kind"], manifest["target"], manifest["reason"]) == ("rollback", "2", "sounds odd")
    assert json.loads(manifest["abandoned"]) == [3, 4] and manifest["digest"] == was
    assert taught.ledger() == ledger
    taught.send("x", 8)
    taught.send("y", 2)
    taught.work(*QUIET)
    assert taught.agree() == 6 and json.loads(taught.manifest(6)["jobs"]) == ["y-0", "y-1"]
    assert taught.everything()[1] == 3, "the third step of the optimizer in these weights"
    before = taught.everything()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.everything() == before and taught.agree() == 6


def run_batches(model: Path, folder: Path, batches: list[list[dict[str, Any]]]) -> tuple[str, int]:
    """Weights and state after exactly these batches, undisturbed; an empty one is a step that changes nothing."""
    folder.mkdir()
    site = Site(folder, model)
    for batch in batches:
        if batch:
            site.producer.enqueue_many(batch)
            site.work(*QUIET, jobs=len(batch))
        else:
            process = Forked(skip_a_step, (str(site.run_dir),), {}, folder / "skip.log")
            assert process.ended() == 0, process.said()
    found = site.everything()
    site.close()
    return found


def skip_a_step(run_dir: str) -> None:
    from worker.shared_weights.attach import attach

    attach(Path(run_dir)).state[8] += 1  # the optimizer's step count: worker/apollo/state_layout.py


@pytest.mark.parametrize(
    "dropped", [["x-2", "x-3"], pytest.param(["x-2"], marks=SLOW), pytest.param(["x-0", "x-7"], marks=SLOW)]
)
def test_without_a_transcript_the_weights_are_those_of_a_run_without_it(
    taught: Site, tmp_path: Path, tiny_model: Path, dropped: list[str]
) -> None:
    said = taught.tandem("rollback", "4", *[word for id in dropped for word in ("--drop", id)])
    assert f"version 5 is live: it is version 4 without {', '.join(dropped)}" in said
    texts = transcripts("x", 8)
    batches = [[item for item in texts[i : i + 2] if item["id"] not in dropped] for i in range(0, 8, 2)]
    assert taught.everything() == run_batches(tiny_model, tmp_path / "without", batches)
    assert taught.everything()[1] == 4, "step numbers stay"

    taught.redis.delete(*[f"rq:job:{id}" for id in dropped])  # as months later
    taught.producer.enqueue_many([item for item in texts if item["id"] in dropped])
    taught.work(*QUIET)
    assert taught.agree() == 5, "a dropped transcript never comes back"
    before, marked = taught.everything(), taught.redis.hgetall(keys.DROPPED)
    assert {id.decode() for id in marked} == set(dropped)
    taught.redis.flushall()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.everything() == before and taught.redis.hgetall(keys.DROPPED) == marked
    assert set(dropped) <= set(taught.ledger())


def test_a_second_rollback_keeps_the_first_ones_drops(taught: Site, tmp_path: Path, tiny_model: Path) -> None:
    taught.tandem("rollback", "4", "--drop", "x-2")
    taught.tandem("rollback", "5", "--drop", "x-5")
    texts = transcripts("x", 8)
    batches = [[item for item in texts[i : i + 2] if item["id"] not in ("x-2", "x-5")] for i in range(0, 8, 2)]
    assert taught.everything() == run_batches(tiny_model, tmp_path / "without", batches)


@pytest.mark.parametrize(
    "point", ["restoring", *(pytest.param(point, marks=SLOW) for point in ("journaled", "restored"))]
)
def test_a_rollback_that_is_killed_is_finished_or_never_was(taught: Site, point: str) -> None:
    was, now = taught.manifest(2)["digest"], taught.digest()
    process = taught.start("rollback", "2", "--drop", "x-5", fault=point)
    assert process.ended() == -9, process.said()
    taught.work(*QUIET)
    if point == "journaled":
        assert taught.agree() == 4 and taught.digest() == now
    else:
        assert taught.agree() == 5 and taught.digest() == was
        assert taught.manifest(5)["kind"] == "rollback" and taught.redis.hkeys(keys.DROPPED) == [b"x-5"]


def test_abandoned_transcripts_are_queued_again_if_asked(taught: Site) -> None:
    said = taught.tandem("rollback", "2", "--requeue", "--drop", "x-5")
    assert "3 of them are queued again" in said
    assert taught.ledger().keys() == {"x-0", "x-1", "x-2", "x-3", "x-5"}
    taught.work(*QUIET)
    assert taught.agree() == 7
    assert [json.loads(taught.manifest(v)["jobs"]) for v in (6, 7)] == [["x-4", "x-6"], ["x-7"]]
    assert taught.producer.status("x-7").version == 7
    before = taught.ledger()
    taught.redis.flushall()
    taught.work(*QUIET)
    assert taught.ledger() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["9"], "version 9 does not exist: the live one is 4"),
        (["4"], "version 4 is live"),
        (["3", "--drop", "nobody"], "no version was trained on it"),
    ],
)
def test_what_makes_no_sense_is_refused(taught: Site, arguments: list[str], says: str) -> None:
    before = taught.everything()
    assert says in taught.tandem("rollback", *arguments, code=1)
    assert taught.agree() == 4 and taught.everything() == before


@SLOW
def test_a_running_worker_is_named(taught: Site) -> None:
    worker = taught.start("worker", "--name", "busy-one", *LEARNING, *QUIET)
    try:
        until(lambda: "worker ready" in worker.said(), "the worker runs")
        assert "busy-one" in taught.tandem("rollback", "2", code=1)
    finally:
        worker.kill()


def test_what_lies_beyond_the_history_is_refused(taught: Site) -> None:
    taught.work("--history", "1", "--keep-checkpoints", "2")
    taught.send("y", 8)
    taught.work("--history", "1", "--keep-checkpoints", "2", "--checkpoint-every", "1")
    said = taught.tandem("rollback", "2", code=1)
    assert "version 2 cannot be made" in said and "pruned" in said and taught.agree() == 8


def test_log_lists_versions_checkpoints_and_what_was_rolled_back(taught: Site) -> None:
    taught.tandem("rollback", "2", "--drop", "x-5")
    said = taught.tandem("log")
    lines = [line for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert [int(line.split()[0]) for line in lines] == [5, 4, 3, 2, 1]
    assert "rollback  to 2  without x-5" in lines[0] and "[checkpoint]" in lines[0]
    assert "(rolled back)" in lines[1] and "(rolled back)" in lines[2] and "(rolled back)" not in lines[3]
    assert "  2 jobs" in lines[3] and "loss" in lines[3] and "x-2 x-3" in lines[3] and "tokens" in lines[3]

    taught.tandem("log", "--mark", "5", "--name", "good")
    assert "[checkpoint: good]" in taught.tandem("log", "-n", "1")
    assert "has no checkpoint" in taught.tandem("log", "--mark", "3", code=1)
    taught.redis.flushall()
    from_journal = taught.tandem("log")
    kept = [line for line in from_journal.splitlines() if line.strip()[:1].isdigit()]
    assert "this is the journal" in from_journal
    assert [line.split()[0] for line in kept] == ["5", "4", "3", "2", "1"] and "x-2 x-3" in kept[3]
    assert {json.loads(line)["version"] for line in taught.tandem("log", "--json").splitlines() if line[:1] == "{"} == {
        1, 2, 3, 4, 5,
    }  # fmt: skip


@SLOW
def test_the_producer_knows_a_dropped_transcript(taught: Site) -> None:
    taught.tandem("rollback", "4", "--drop", "x-2")
    assert Producer(taught.store.url).status("x-2").version == 2, "trained then, and taken out since: in the ledger"


@SLOW
def test_the_page_goes_back_to_a_version_and_shows_how_it_went(taught: Site) -> None:
    """Asked for by a form of the page, done by a `tandem rollback` of its own, told on the page until it has ended."""
    app = make_app(taught.store.url, run_dir=taught.run_dir, state_dir=taught.state, allow_actions=True)
    client, path = app.test_client(), "/learning/actions/rollback/2"

    def shown(path: str) -> str:
        return client.get(path, base_url="http://127.0.0.1").get_data(as_text=True)

    assert "tandem rollback 2" in shown(path) and 'name="choice"' in shown(path)
    form = {"token": app.extensions["tandem"].tokens.of(path), "choice": "on"}
    sent = client.post(path, base_url="http://127.0.0.1", data=form)
    assert sent.headers["Location"] == "/learning/actions/rollback/progress"
    until(lambda: "running" not in shown(sent.headers["Location"]), "the rollback ends")
    told = shown(sent.headers["Location"])
    assert "done" in told and "version 5 is live: it is version 2; 4 transcripts of 2 later versions" in told
    assert taught.agree() == 5 and taught.redis.llen(f"rq:queue:{keys.QUEUE}") == 4, "and they are queued again"
    assert "from the dashboard" in shown("/learning/versions/5") and "rolled back" in shown("/learning/versions/4")
