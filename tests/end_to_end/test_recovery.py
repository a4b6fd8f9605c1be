"""What a worker finds at its start, and what it makes of it: crashes, lost weights, a lost Redis, broken files.

Redis and the worker are real; the server is the stand-in (tests/helpers/stand_in.py): its memory and sockets are real.
What is expected is what an undisturbed run of the same batches gave, bit for bit, optimizer's state and step count
included.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from durable_parts import LEARNING, QUIET, Site, transcripts
from patience import until

from producer import keys
from worker.checkpoint.batch_codec import unpack_batch
from worker.checkpoint.file_digests import fingerprint
from worker.checkpoint.journal import Journal

SLOW = pytest.mark.slow
"""What repeats the guarding tests at every other point, and with every other file."""


def points(always: str, *others: str) -> list[Any]:
    """Crash points: those that are always passed, and the others."""
    return [*always.split(), *(pytest.param(point, marks=SLOW) for point in others)]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[str, int]]]:
    """Version -> weights, state and step count of a run in which nothing went wrong: two transcripts a version."""
    site = Site(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    seen = {0: site.everything()}
    site.send("x", 8)
    for version in range(1, 5):
        worker = site.start("worker", "--max-jobs", "2", *LEARNING, *QUIET, "--until-empty", fault="committed")
        worker.ended()
        seen[version] = site.everything()
    yield seen
    site.close()


def run(model: Path, folder: Path, ids: list[str]) -> tuple[str, int]:
    """Weights and state of an undisturbed run of the eight transcripts in the order of `ids`, two a version."""
    folder.mkdir()
    site = Site(folder, model)
    texts = {item["id"]: item for item in transcripts("x", 8)}
    site.producer.enqueue_many([texts[id] for id in ids])
    site.work(*QUIET)
    found = site.everything()
    site.close()
    return found


@pytest.fixture
def taught(site: Site) -> Site:
    """Four versions of two transcripts each, the newest checkpoint at version 2."""
    site.send("x", 8)
    site.killed("committed:2", *QUIET)
    site.tandem("worker", "--until-empty", *LEARNING, *QUIET, "--checkpoint-every", "1", "--max-jobs", "2")
    for version in (3, 4):
        shutil.rmtree(site.state / "checkpoints" / str(version), ignore_errors=True)
    assert site.agree() == 4
    return site


@pytest.mark.parametrize(
    "point", points("journaled paused applying applied", "backward", "swept", "resumed", "committed")
)
def test_a_worker_killed_anywhere_costs_nothing(
    site: Site, point: str, undisturbed: dict[int, tuple[str, int]], tiny_model: Path, tmp_path: Path
) -> None:
    ids = site.send("x", 8)
    site.killed(f"{point}:2", *QUIET)
    said = site.work(*QUIET)
    assert site.agree() == 4 and sorted(site.trained()) == ids and len(site.ledger()) == 8
    expected = undisturbed[4]
    if site.trained() != ids:  # RQ queues the killed worker's batch at the end
        assert point in ("backward", "journaled", "paused") and site.trained() == ids[:2] + ids[4:] + ids[2:4]
        expected = run(tiny_model, tmp_path / "same-order", site.trained())
    assert site.everything() == expected, said


@pytest.mark.parametrize("point", points("restored", "restoring"))
def test_a_worker_killed_while_it_recovers_leaves_it_to_the_next(
    site: Site, point: str, undisturbed: dict[int, tuple[str, int]]
) -> None:
    ids = site.send("x", 8)
    site.killed("applying:3", *QUIET)
    site.is_torn()
    site.killed(point, *QUIET)
    site.is_torn()
    assert site.header()["state"] == "APPLYING"
    said = site.work(*QUIET)
    assert "torn" in said and "version 3 was made from the source model and 3 journaled batches" in said
    assert site.agree() == 4 and site.trained() == ids and site.everything() == undisturbed[4]


def test_a_restarted_server_learns_again_what_it_knew(taught: Site, undisturbed: dict[int, tuple[str, int]]) -> None:
    lineage = taught.header()["lineage"]
    taught.restart_server()
    assert taught.header()["version"] == 0 and taught.header()["lineage"] != lineage
    said = taught.work(*QUIET)
    assert "version 4 was made from the checkpoint of version 2 and 2 journaled batches" in said
    assert "bit for bit what they were" in said
    assert taught.agree() == 4 and taught.header()["lineage"] == lineage
    assert taught.everything() == undisturbed[4]
    taught.send("y", 2)
    taught.work(*QUIET)
    assert taught.agree() == 5


@pytest.mark.parametrize("point", points("swept", "journaled", "applying", "resumed"))
def test_worker_and_server_both_gone(site: Site, point: str, undisturbed: dict[int, tuple[str, int]]) -> None:
    ids = site.send("x", 8)
    site.killed(f"{point}:3", *QUIET)
    site.restart_server()
    site.work(*QUIET)
    assert site.agree() == 4 and site.trained() == ids and site.everything() == undisturbed[4]


@SLOW
def test_a_server_that_dies_while_it_is_restored(taught: Site, undisturbed: dict[int, tuple[str, int]]) -> None:
    taught.restart_server()
    taught.killed("restored", *QUIET)
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.agree() == 4 and taught.everything() == undisturbed[4]


def test_a_redis_that_lost_everything_is_told_who_was_trained(taught: Site) -> None:
    before, manifest = taught.ledger(), taught.manifest(3)
    taught.redis.flushall()
    said = taught.work(*QUIET)
    assert "Redis was empty" in said and "8 trained transcripts" in said
    assert taught.ledger() == before and taught.agree() == 4 and taught.manifest(3)["loss"] == manifest["loss"]
    taught.send("x", 8)  # the application sends all of it again
    taught.work(*QUIET)
    assert taught.agree() == 4, "nobody is trained twice"


@SLOW
def test_redis_and_server_lost_everything(taught: Site, undisturbed: dict[int, tuple[str, int]]) -> None:
    before = taught.ledger()
    taught.redis.flushall()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.ledger() == before and taught.agree() == 4 and taught.everything() == undisturbed[4]


def test_a_redis_that_lost_its_last_writes_gets_them_from_the_journal(taught: Site) -> None:
    """As after a crash of its machine: the last versions unknown, their transcripts queued as before."""
    before, ids = taught.ledger(), [f"x-{i}" for i in range(4, 8)]
    with taught.redis.pipeline() as pipe:
        pipe.set(keys.VERSION, 2)
        pipe.hset(keys.STATE, "version", 2)
        pipe.hdel(keys.LEDGER, *ids)
        pipe.delete(keys.manifest(3), keys.manifest(4), *[f"rq:job:{id}" for id in ids])
        pipe.execute()
    taught.send("x", 8)
    assert taught.producer.version() == 2 and taught.redis.llen("rq:queue:feedback") == 4
    said = taught.work(*QUIET)
    assert "versions 3 to 4 were in the weights but not in Redis: committed from the journal, with 4 jobs" in said
    assert taught.agree() == 4 and taught.ledger() == before
    assert taught.redis.llen("rq:queue:feedback") == 0


def test_a_redis_that_falls_back_while_the_worker_runs_is_told_before_the_next_step(site: Site) -> None:
    worker = site.start("worker", "--max-jobs", "2", *LEARNING, *QUIET)
    site.send("x", 8)
    until(lambda: site.producer.version() == 4, "four versions")
    before, ids = site.ledger(), [f"x-{i}" for i in range(4, 8)]
    with site.redis.pipeline() as pipe:
        pipe.set(keys.VERSION, 2)
        pipe.hdel(keys.LEDGER, *ids)
        pipe.delete(keys.manifest(3), keys.manifest(4), *[f"rq:job:{id}" for id in ids])
        pipe.execute()
    site.send("x", 8)
    site.send("y", 2)
    until(lambda: "y-1" in site.ledger(), "the worker goes on")
    assert "it gets them from the journal" in worker.said() and worker.alive()
    assert {id: version for id, version in site.ledger().items() if id[0] == "x"} == before
    assert site.agree() == 5 and sorted(site.trained()) == sorted([*before, "y-0", "y-1"])
    worker.kill()


def test_rehearsed_transcripts_are_replayed_and_dropped_with_their_first_training(taught: Site) -> None:
    taught.send("y", 4)
    taught.work("--rehearse", "1", *QUIET)
    rehearsed = [json.loads(taught.manifest(version)["rehearsed"]) for version in (5, 6)]
    assert len(rehearsed[0]) == len(rehearsed[1]) == 2
    before = taught.everything()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.agree() == 6 and taught.everything() == before
    record = Journal(taught.state / "journal", fingerprint(taught.model)).read(5)
    left = [example.id for example in unpack_batch(record, frozenset(rehearsed[0][:1]))]
    assert left == ["y-0", "y-1", f"rehearsed:{rehearsed[0][1]}"]


def test_a_failed_canary_goes_back_to_the_last_version_that_passed(taught: Site, tmp_path: Path) -> None:
    canary = tmp_path / "canary.jsonl"
    canary.write_text(json.dumps(transcripts("canary", 1)[0]) + "\n")
    watch = ["--canary", str(canary), "--canary-every", "1", "--auto-rollback"]
    taught.send("y", 2)
    taught.work(*watch, "--canary-bound", "1000", *QUIET)
    good = taught.digest()
    taught.send("z", 4)
    said = taught.work(*watch, "--canary-bound", "0.001", *QUIET, code=1)
    assert "version 7 is version 5 again" in said and "paused" in said
    assert taught.agree() == 7 and taught.digest() == good and "z-2" not in taught.ledger()


def test_the_ledger_in_a_checkpoint_outlives_journal_and_redis(taught: Site) -> None:
    taught.tandem("worker", "--until-empty", *LEARNING, "--history", "0")  # writes a checkpoint, prunes the journal
    assert Journal(taught.state / "journal", fingerprint(taught.model)).entries.keys() <= {3, 4}
    before = taught.ledger()
    taught.redis.flushall()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.ledger() == before and taught.agree() == 4


def newest_file(site: Site) -> Path:
    return max((site.state / "journal").glob("*.journal"))


@SLOW
def test_a_torn_tail_is_cut_and_told(taught: Site, undisturbed: dict[int, tuple[str, int]]) -> None:
    whole = newest_file(taught).read_bytes()
    newest_file(taught).write_bytes(whole + b"TDJ1" + bytes(30))
    taught.restart_server()
    said = taught.work(*QUIET)
    assert "cut 34 bytes" in said and taught.everything() == undisturbed[4]
    assert newest_file(taught).read_bytes()[: len(whole)] == whole


def test_a_flipped_bit_in_the_journal_stops_the_worker_and_not_the_server(taught: Site) -> None:
    path = min((taught.state / "journal").glob("*.journal"))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)
    said = taught.work(*QUIET, code=1)
    assert f"{path.name} is damaged at byte" in said and "backup" in said
    assert taught.agree() == 4
    # The way out that the message names, while the server lives:
    (taught.state / "journal").rename(taught.state / "aside")
    said = taught.work(*QUIET)
    assert "checkpoint of version 4 written" in said and taught.agree() == 4
    before = taught.everything()
    taught.restart_server()
    taught.work(*QUIET)
    assert taught.agree() == 4 and taught.everything() == before and len(taught.ledger()) == 8


def test_a_damaged_checkpoint_is_passed_over(taught: Site, undisturbed: dict[int, tuple[str, int]]) -> None:
    file = taught.state / "checkpoints" / "2" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1000] ^= 1
    file.write_bytes(whole)
    taught.restart_server()
    said = taught.work(*QUIET)
    assert "checkpoints/2 is damaged: model.safetensors" in said and "from the source model and 4 journaled" in said
    assert taught.agree() == 4 and taught.everything() == undisturbed[4]


@SLOW
def test_nothing_left_to_restore_from_is_an_error_that_changes_nothing(taught: Site) -> None:
    taught.tandem("worker", "--until-empty", *LEARNING, "--history", "0")
    for file in (taught.state / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    taught.restart_server()
    fresh = taught.everything()
    said = taught.work(*QUIET, code=1)
    assert "damaged" in said or "cannot be made" in said
    assert "cannot be made: it goes back to version" in said
    assert taught.everything() == fresh and taught.served()["state"] == "serving"


def test_a_lost_state_directory_is_begun_again_from_the_live_weights(taught: Site) -> None:
    shutil.rmtree(taught.state)
    assert "checkpoint of version 4 written" in taught.work(*QUIET)
    before = taught.everything()
    taught.restart_server()
    taught.redis.flushall()
    taught.work(*QUIET)
    assert taught.agree() == 4 and taught.everything() == before and len(taught.ledger()) == 8


@SLOW
def test_torn_weights_without_a_state_directory_are_refused(taught: Site, tmp_path: Path) -> None:
    taught.send("y", 2)
    taught.killed("applying", *QUIET)
    shutil.rmtree(taught.state)
    said = taught.work(*QUIET, code=1)
    assert "torn" in said and "neither journal nor checkpoint" in said and "--new-lineage" in said
    taught.is_torn()


def test_a_new_lineage_goes_on_and_is_restored_itself(taught: Site) -> None:
    taught.restart_server()
    taught.send("y", 2)
    said = taught.work("--new-lineage", *QUIET)
    assert taught.agree() == 6 and "version 5" in said
    before, lineage = taught.everything(), taught.header()["lineage"]
    taught.restart_server()
    said = taught.work(*QUIET)
    assert "from the source model and 1 journaled batch" in said
    assert taught.agree() == 6 and taught.everything() == before and taught.header()["lineage"] == lineage
    assert len(taught.ledger()) == 10


@SLOW
def test_a_state_directory_of_other_weights_is_refused(taught: Site, tmp_path: Path, tiny_model: Path) -> None:
    other = Site(tmp_path / "other", tiny_model)
    try:
        other.send("z", 2)
        other.work(*QUIET)
        other.restart_server()
        said = other.tandem("worker", "--until-empty", *LEARNING, "--state-dir", str(taught.state), code=1)
        assert "Redis counts lineage" in said and "--state-dir" in said
        assert other.header()["version"] == 0
    finally:
        other.close()


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """The state directory, on a file system of 64 KB; skipped where mounting is not allowed."""
    site.state.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", site.state], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield site.state
    subprocess.run(["umount", site.state], check=True)


def test_a_full_disk_stops_training_and_not_serving(
    site: Site, small_disk: Path, undisturbed: dict[int, tuple[str, int]]
) -> None:
    ids = site.send("x", 8)
    (small_disk / "filler").write_bytes(bytes(56 * 1024))
    said = site.work(*QUIET, code=1)
    assert "the journal in" in said and "No space left on device" in said and "make room" in said
    reached = site.agree()
    assert reached < 4 and site.everything() == undisturbed[reached]
    (small_disk / "filler").unlink()
    said = site.work("--checkpoint-every", "1")  # there is no room for a checkpoint
    assert "no checkpoint was written" in said and "MB are free" in said
    assert site.agree() == 4 and site.trained() == ids and site.everything() == undisturbed[4]
