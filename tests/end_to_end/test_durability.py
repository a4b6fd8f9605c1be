"""The order in which an update reaches the disk, the record and the weights; and what a power cut leaves.

The server is the stand-in, whose memory and sockets are real; the trainer is in this process, to be watched.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import Disk
from durable_parts import Site, transcripts

from producer.transcript import Transcript
from worker.checkpoint import replay, state_dir
from worker.checkpoint.batch_codec import Ready
from worker.checkpoint.journal import Journal
from worker.checkpoint.snapshots import Snapshots, Trained
from worker.config.hyperparameters import Hyperparameters
from worker.config.retention import Policy
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.session import open_session
from worker.shared_weights.header import APPLYING, CLEAN

H = Hyperparameters(lr=3e-4, max_length=512)
pytestmark = pytest.mark.usefixtures("as_it_was")


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    running = Site(tmp_path_factory.mktemp("server"), tiny_model)
    yield running
    running.close()


@pytest.fixture
def step(server: Site, tmp_path: Path) -> Iterator[LiveUpdate]:
    """At the newest version of the module's server, with a state directory of its own."""
    policy = Policy(every=1, keep=2, history=2)
    with open_session(server.run_dir, "test", H, state_dir=tmp_path / "state", policy=policy) as session:
        header = session.weights.header
        session.manager.adopt(header.version, header.lineage, Trained({}, {}), parent=None)
        yield LiveUpdate(session)


def ready(step: LiveUpdate, prefix: str, count: int = 2) -> list[Ready]:
    return [step.prepare(item["id"], Transcript.from_dict(item)) for item in transcripts(prefix, count)]


def digest(step: LiveUpdate) -> str:
    return replay.digest(step.session.weights.tensors)


def watch(step: LiveUpdate, monkeypatch: pytest.MonkeyPatch, seen: list[str], look: Any) -> None:
    """Note each stage of an update as it begins or ends, and call `look(stage)`."""

    def wrap(owner: Any, name: str, before: str = "", after: str = "") -> None:
        whole = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            for stage, now in ((before, True), (after, False)):
                if not now:
                    found = whole(*arguments, **options)
                if stage:
                    seen.append(stage)
                    look(stage)
            return found

        monkeypatch.setattr(owner, name, wrapped)

    wrap(step.session.manager, "before", after="journaled")
    wrap(step.session.control, "pause", before="pause", after="paused")
    wrap(step.session.weights.record, "write", after="recorded")
    wrap(step.session.weights.header, "begin", before="begin")
    wrap(step.session.trainer, "write", before="write", after="written")
    wrap(step.session.weights.header, "finish", before="finish", after="finished")
    wrap(step.session.control, "resume", after="resumed")


def test_an_update_reaches_disk_record_header_and_weights_in_this_order(
    step: LiveUpdate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    batch, header = ready(step, "order"), step.session.weights.header
    version, before, seen = header.version + 1, digest(step), list[str]()

    def look(stage: str) -> None:
        assert (digest(step) == before) == (stage not in ("written", "finish", "finished", "resumed")), stage
        assert header.state == (APPLYING if stage in ("write", "written", "finish") else CLEAN), stage
        if stage == "pause":  # while the server still serves: the version is on disk, whatever happens to the power
            found = Journal(
                disk.after_a_power_cut(tmp_path / "cut") / "state" / "journal", step.session.manager.journal.source
            )
            assert found.entries[version].ids == [one.id for one in batch] and found.notices == []
        if stage == "begin":  # a restarted worker that finds CLEAN and this version can commit it
            record = step.session.weights.record.read()
            assert record is not None and record["version"] == version and len(record["jobs"]) == 2

    watch(step, monkeypatch, seen, look)
    assert step.run(batch).version == version
    in_order = "journaled pause paused recorded begin write written finish finished resumed"
    assert seen == in_order.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_write_waits_for_its_end(
    server: Site, step: LiveUpdate, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    header, caught = step.session.weights.header, list[tuple[str, int]]()
    version = header.version + 1
    write = step.session.trainer.write

    def interrupted() -> Any:
        os.kill(os.getpid(), number)
        for _ in range(1000):  # time for Python to run a handler
            pass
        assert not caught
        return write()

    def handler(signum: int, frame: Any) -> None:
        caught.append((header.state, header.version))
        raise KeyboardInterrupt

    monkeypatch.setattr(step.session.trainer, "write", interrupted)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step.run(ready(step, f"signal-{number}"))
    finally:
        signal.signal(number, before)
    assert caught == [(CLEAN, version)], "once, when the weights were whole again"
    assert server.served()["version"] == version and server.served()["state"] == "serving"


def test_what_a_power_cut_leaves_of_the_state_directory(
    step: LiveUpdate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names as well as bytes: a file that was renamed into a folder is there when the folder was synced."""
    disk = Disk(tmp_path, monkeypatch)
    journal, manager = step.session.manager.journal, step.session.manager
    first = step.session.weights.header.version + 1
    for index in range(2):
        step.run(ready(step, f"cut-{index}", 1))
        manager.checkpoints.write()  # which begins a new file of the journal
        cut = disk.after_a_power_cut(tmp_path / f"cut-{index}") / "state"
        found = Journal(cut / "journal", journal.source)
        assert set(range(first, first + index + 1)) <= set(found.entries) and found.notices == []
        snapshots = Snapshots(cut / "checkpoints", step.session.weights.model_path)
        assert snapshots.check(first + index).lineage == step.session.weights.header.lineage
        assert snapshots.trained(first + index).ledger[f"cut-{index}-0"] == first + index


def test_a_state_directory_outlives_the_power_cut_after_its_first_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    disk = Disk(tmp_path, monkeypatch)
    with state_dir.StateDir(tmp_path / "home" / "tandem" / "model") as state:
        Journal(state.journal, "a" * 32).close()
    cut = disk.after_a_power_cut(tmp_path / "cut")
    (journal,) = (cut / "home" / "tandem" / "model" / "journal").glob("*.journal")
    assert journal.stat().st_size > 0, "its bytes as well as its name"
    assert (cut / "home" / "tandem" / "model" / "checkpoints").is_dir()


def test_checkpoints_and_journal_follow_the_history(step: LiveUpdate) -> None:
    """A checkpoint a version, two of them and a history of two kept: what pruning.kept says is what is deleted."""
    first = step.session.weights.header.version
    for index in range(7):
        step.run(ready(step, f"history-{index}", 1))
        step.session.manager.checkpoints.write_if_due()
    newest = step.session.weights.header.version
    snapshots, journal = step.session.manager.history.snapshots, step.session.manager.journal
    base = min(snapshots.versions())
    assert newest == first + 7 and newest - 2 * 2 - 1 <= base <= newest - 2
    assert set(snapshots.versions()) >= {base, newest - 1, newest} and len(snapshots.versions()) <= 4
    assert sorted(journal.entries) == list(range(base + 1, newest + 1))
    for version in range(newest - 2, newest + 1):
        assert step.session.manager.rebuilder.plan(version).base >= base
    assert len(step.session.manager.history.trained(newest).ledger) == 7


def test_a_visitor_prunes_nothing(server: Site, tmp_path: Path) -> None:
    """`tandem rollback` and `tandem train --attach` do not know the worker's --history."""
    with open_session(server.run_dir, "test", H, state_dir=tmp_path / "state") as session:
        step, header = LiveUpdate(session), session.weights.header
        step.session.manager.checkpoints.policy = Policy(every=1, keep=2, history=1)  # by which a worker would prune
        step.session.manager.adopt(header.version, header.lineage, Trained({}, {}), parent=None)
        for index in range(4):
            step.run(ready(step, f"visit-{index}", 1))
            step.session.manager.checkpoints.write()
        versions = list(range(header.version - 3, header.version + 1))
        assert step.session.manager.history.snapshots.versions() == versions
        assert set(versions) <= step.session.manager.journal.entries.keys()
