"""What was dropped, or abandoned, stays out: of rollback, recovery, --requeue, --rehearse, and the guards' memory."""

import json
import shutil
from pathlib import Path
from typing import Any

from chaos_processes import Forked
from durable_parts import QUIET, Site, transcripts
from test_rollback import run_batches

from producer import keys
from worker.checkpoint import record_file

KEPT = Path(__file__).parents[1] / "data" / "state_format_1"


def jobs_of(site: Site, first: int) -> list[list[str]]:
    return [json.loads(site.manifest(v)["jobs"]) for v in range(first, site.producer.version() + 1)]


def test_a_dropped_transcript_is_in_no_later_version(taught: Site, tmp_path: Path, tiny_model: Path) -> None:
    taught.tandem("rollback", "4", "--drop", "x-2")
    said = taught.tandem("rollback", "3")
    assert "version 6 is live: it is version 3" in said
    texts = {item["id"]: item for item in transcripts("x", 8)}
    batches = [[texts[id] for id in batch] for batch in (["x-0", "x-1"], ["x-3"], ["x-4", "x-5"])]
    without = run_batches(tiny_model, tmp_path / "without", batches)
    assert taught.everything() == without and taught.manifest(6)["digest"] != taught.manifest(3)["digest"]
    taught.recover()
    assert taught.agree() == 6 and taught.everything() == without, "recovery, from the checkpoint"
    taught.recover(from_journal=True)
    assert taught.agree() == 6 and taught.everything() == without, "recovery, from the journal alone"
    assert taught.redis.hgetall(keys.DROPPED) == {b"x-2": b"5"}

    said = taught.tandem("rollback", "1", "--requeue")  # 3, 4, 5 lie behind it, and x-2 with them
    assert "5 of them are queued again" in said
    taught.work(*QUIET)
    again = [id for batch in jobs_of(taught, 8) for id in batch]
    assert sorted(again) == ["x-3", "x-4", "x-5", "x-6", "x-7"] and taught.ledger()["x-2"] == 2


def test_who_is_queued_again_is_trained_once(taught: Site) -> None:
    """Back to 2 with x-4 to x-7 queued again, and then back to 4 after all: they are in the weights, and leave it."""
    taught.tandem("rollback", "2", "--requeue")
    assert taught.ledger().keys() == {f"x-{i}" for i in range(4)} and taught.redis.llen("rq:queue:feedback") == 4
    said = taught.tandem("rollback", "4")
    assert "4 transcripts that were queued again are in the weights once more" in said
    assert taught.ledger().keys() == {f"x-{i}" for i in range(8)}
    taught.work(*QUIET)
    assert taught.agree() == 6 and taught.producer.status("x-7").version == 6
    before = taught.ledger()
    taught.redis.flushall()
    taught.work(*QUIET)
    assert taught.ledger() == before, "the same from the journal"
    # Both branches have x-4 to x-7 now; one entry each is enough.
    taught.tandem("rollback", "2", "--requeue")
    assert taught.redis.lrange("rq:queue:feedback", 0, -1) == [f"x-{i}".encode() for i in range(4, 8)]


def test_rehearsal_knows_the_live_branch_alone(taught: Site) -> None:
    taught.tandem("rollback", "3", "--drop", "x-1")
    taught.tandem("rollback", "2")
    taught.send("y", 1)
    taught.work("--rehearse", "4", *QUIET)
    assert sorted(json.loads(taught.manifest(7)["rehearsed"])) == ["x-0", "x-2", "x-3"]
    before = taught.everything()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.agree() == 7 and taught.everything() == before


def go_back_in_a_worker(redis_url: str, run_dir: str, state: str, answers: str) -> None:
    """In a process of its own: what a worker remembers before and after it has gone back by itself."""
    import redis
    import torch

    from worker.config.guard_options import GuardSettings
    from worker.config.hyperparameters import Hyperparameters
    from worker.consumer.worker_lock import WorkerLock
    from worker.orchestrator.agreement import agree
    from worker.orchestrator.session import open_session
    from worker.orchestrator.worker_loop import WorkerLoop
    from worker.versions import ledger

    torch.set_num_threads(1)
    connection, seen = redis.Redis.from_url(redis_url), []
    with open_session(
        Path(run_dir), "watch", Hyperparameters(), state_dir=Path(state), known=ledger.state(connection)
    ) as session:
        agree(connection, session)
        lock, guards = WorkerLock(connection, "watch"), GuardSettings(rehearse=1.0)
        loop = WorkerLoop(connection, session, lock, guards, until_empty=True, hooks=[])
        for target in (None, 2, 4):
            if target is not None:
                loop._go_back(target)
            assert loop.update.rehearsal is not None and loop.update.guards is not None
            known = [ready.id for ready in loop.update.rehearsal.known]
            seen.append({"rehearsed": known, "losses": len(loop.update.guards.losses.values)})
    Path(answers).write_text(json.dumps(seen))


def test_a_worker_that_rolls_back_forgets_what_it_left_behind(taught: Site) -> None:
    taught.tandem("rollback", "4", "--drop", "x-0")
    answers = taught.folder / "answers.json"
    arguments = (taught.store.url, str(taught.run_dir), str(taught.state), str(answers))
    process = Forked(go_back_in_a_worker, arguments, {}, taught.folder / "watch.log")
    assert process.ended() == 0, process.said()
    every, two, four = json.loads(answers.read_text())
    assert every == four == {"rehearsed": [f"x-{i}" for i in range(1, 8)], "losses": 8}
    assert two == {"rehearsed": ["x-1", "x-2", "x-3"], "losses": 4}


def test_an_old_journal_that_took_somebody_back_in_is_made_again_without(
    site: Site, tmp_path: Path, tiny_model: Path
) -> None:
    """Version 5 of tests/data/state_format_1/dropped has x-2 in it; the weights that follow from it now have not."""
    shutil.copytree(KEPT / "dropped" / "journal", site.state / "journal")
    site.work(*QUIET)
    assert site.agree() == 6
    record = next(
        record
        for path in sorted((site.state / "journal").glob("*.journal"))
        for _, record in record_file.scan(path, last=False).records
        if record["kind"] == "update" and record["version"] == 2
    )
    texts: dict[str, dict[str, Any]] = {item["id"]: item["transcript"] for item in record["batch"]}
    assert set(texts) == {"x-2", "x-3"}
    old = json.loads((KEPT / "dropped" / "expected.json").read_text())["6"]
    assert site.everything()[1] == old["step"] and site.digest() != old["digest"]
    assert site.redis.hgetall(keys.DROPPED) == {b"x-2": b"4"} and "x-2" in site.ledger()
