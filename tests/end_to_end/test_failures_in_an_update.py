"""What goes wrong inside an update, a canary or a rollback, before and after the first write: real Redis and RQ, the
worker's loop in this process, and the stand-in, whose memory and sockets are real."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from chaos_processes import until
from click.testing import CliRunner
from durable_parts import QUIET, Site, transcripts

from producer import keys
from producer.transcript import Transcript
from worker.checkpoint import rebuild
from worker.checkpoint.batch_codec import Ready
from worker.cli.resume import command as resume
from worker.config.guard_options import GuardSettings
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import TornWeightsError, UnavailableError
from worker.config.update_options import ApplySettings
from worker.consumer.worker_lock import WorkerLock
from worker.orchestrator import agreement, applying
from worker.orchestrator.agreement import agree
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.session import open_session
from worker.orchestrator.worker_loop import WorkerLoop
from worker.serving import control_client
from worker.shared_weights.header import APPLYING
from worker.trainer.outliers import Guards
from worker.trainer.trainer import Trainer
from worker.versions import ledger, pause_switch

H = Hyperparameters(lr=3e-4, max_length=512)
pytestmark = pytest.mark.usefixtures("as_it_was")


@contextmanager
def worker(site: Site, guards: GuardSettings, settings: ApplySettings = ApplySettings()) -> Iterator[WorkerLoop]:  # noqa: B008
    """`tandem worker --until-empty`, a job a version, in this process."""
    connection = redis.Redis.from_url(site.store.url)
    lock = WorkerLock(connection, "here")
    lock.acquire()
    limits: dict[str, Any] = {"name": "here", "max_jobs": 1, "max_tokens": 8192, "linger": 0.0}
    try:
        known = ledger.state(connection)
        with open_session(site.run_dir, "here", H, state_dir=site.state, known=known, settings=settings) as session:
            agree(connection, session)
            yield WorkerLoop(connection, session, lock, guards, until_empty=True, hooks=[], **limits)
    finally:
        lock.release()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Held-out conversations."""
    file = tmp_path / "canary.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in transcripts("held-out", 2)))
    return file


def test_the_lease_of_a_streamed_write_knows_how_long_the_forward_pass_took(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one would outlast a lease that knows of no other, on a slow machine: the server would be torn."""
    planned: list[float] = []
    monkeypatch.setattr(control_client, "lease_seconds", lambda seconds: planned.append(seconds) or 3600.0)
    monkeypatch.setattr(applying, "BACKWARD", 1e6)
    site.send("long", 1)
    with worker(site, GuardSettings(outliers=0), ApplySettings(apply="streaming")) as loop:
        loop.run()
    assert site.agree() == 1 and planned[-1] == pytest.approx(1e6 * float(site.manifest(1)["forward_s"]))


def held(site: Site) -> str:
    return pause_switch.pause_reason(site.redis) or ""


def judged(canary: Path, bound: float, **more: Any) -> GuardSettings:
    sets, bounds = (("canary", canary),), ((None, bound),)
    return GuardSettings(outliers=0, canary=sets, canary_every=1, canary_bound=bounds, **more)


def fail_at(site: Site, canary: Path) -> GuardSettings:
    """One version that passed, and flags under which no later one does."""
    site.send("good", 1)
    with worker(site, judged(canary, bound=100.0)) as loop:
        loop.run()
    assert site.agree() == 1 and site.redis.hget("weights:state", "canary_good") == b"1"
    site.send("bad", 2)
    return judged(canary, bound=1e-6, auto_rollback=True)


def test_a_canary_s_rollback_that_breaks_off_in_its_write_ends_the_worker(
    site: Site, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, replay = fail_at(site, canary), rebuild.replay.replay

    def lost(*arguments: Any) -> Any:
        replay(*arguments)  # the weights are those of another version by now
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(rebuild.replay, "replay", lost)
    said = r"version 3, which is to be version 1 again.*finishes the rollback"
    with pytest.raises(TornWeightsError, match=said), worker(site, settings) as loop:
        loop.run()
    monkeypatch.undo()
    site.is_torn()
    assert site.header()["state"] == APPLYING and "`tandem worker` again" in site.served()["reason"]
    assert "version 2 is" in held(site), "and nothing is trained until somebody has looked"
    site.work(*QUIET, code=1)  # paused: it says so, once it has restored the weights
    assert site.agree() == 3 and site.manifest(3)["kind"] == "rollback" and site.manifest(3)["target"] == "1"
    assert site.digest() == site.manifest(1)["digest"]
    assert CliRunner().invoke(resume, ["--redis", site.store.url]).exit_code == 0
    site.work(*QUIET)
    assert sorted(site.trained()) == ["bad-0", "bad-1", "good-0"]


def test_a_canary_s_rollback_after_which_the_server_cannot_resume_ends_the_worker(
    site: Site, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fail_at(site, canary)
    with pytest.raises(UnavailableError, match="could not be resumed at version 3"), worker(site, settings) as loop:
        control = loop.session.control
        resume_server = control.resume

        def gone(version: int, rebuilt: bool = False) -> None:
            if rebuilt:
                control.close()
            resume_server(version, rebuilt)

        monkeypatch.setattr(control, "resume", gone)
        loop.run()
    until(lambda: site.served()["state"] == "serving", "the server goes on by itself")
    assert site.served()["version"] == 3 and site.producer.version() == 2
    site.work(*QUIET, code=1)
    assert site.agree() == 3 and site.digest() == site.manifest(1)["digest"]


def test_a_canary_s_rollback_that_redis_does_not_hear_of_ends_the_worker(
    site: Site, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fail_at(site, canary)
    monkeypatch.setattr(agreement, "REDIS_SECONDS", 0.5)
    with ExitStack() as stack:
        loop = stack.enter_context(worker(site, settings))
        control = loop.session.control
        resume_server = control.resume

        def and_redis_goes(version: int, rebuilt: bool = False) -> None:
            resume_server(version, rebuilt)
            if rebuilt:
                site.store.stop()

        monkeypatch.setattr(control, "resume", and_redis_goes)
        with pytest.raises(UnavailableError, match="rolled back to version 1, and Redis, which has not heard of it"):
            loop.run()
        assert site.served()["version"] == 3
        site.store.start()
    site.redis.delete(keys.WORKER_LOCK)  # it could not be given back, and this process, whose it is, lives
    assert site.producer.version() == 2
    site.work(*QUIET, code=1)
    assert site.agree() == 3 and site.digest() == site.manifest(1)["digest"]


def test_a_canary_that_goes_back_is_followed_by_training_on_hold(site: Site, canary: Path) -> None:
    settings = replace(fail_at(site, canary), rehearse=1.0)
    with (
        pytest.raises(UnavailableError, match=r"paused.*version 3 is version 1 again"),
        worker(site, settings) as loop,
    ):
        loop.run()
    assert loop.update.rehearsal is not None and [ready.id for ready in loop.update.rehearsal.known] == ["good-0"]
    assert site.agree() == 3 and site.digest() == site.manifest(1)["digest"]
    assert loop.session.trainer.optimizer.step_count == 1


def test_a_canary_that_cannot_be_scored_stops_training_and_says_so(
    site: Site, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.send("x", 2)

    def broken(self: Trainer, examples: Any) -> dict[str, float]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "score", broken)
    said = r"paused.*could not be scored at version 1 .RuntimeError"
    with pytest.raises(UnavailableError, match=said), worker(site, judged(canary, bound=100.0)) as loop:
        loop.run()
    assert site.agree() == 1 and "could not be scored" in held(site) and site.served()["state"] == "serving"
    assert site.redis.hget("weights:state", "canary_good") is None
    assert [site.producer.status(f"x-{i}").state for i in range(2)] == ["finished", "queued"]


# An update's own stages


def ready(update: LiveUpdate, prefix: str) -> list[Ready]:
    return [update.prepare(item["id"], Transcript.from_dict(item)) for item in transcripts(prefix, 2)]


@pytest.mark.parametrize("part", ["guards", "journal", "rehearsal"])
def test_what_fails_once_a_version_is_live_ends_the_worker_and_trains_nobody_twice(
    site: Site, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    site.send("x", 2)

    def broken(*_: Any) -> None:
        raise ValueError("I/O operation on closed file")

    settings = GuardSettings(outliers=8.0, rehearse=1.0)
    with pytest.raises(UnavailableError, match=r"version 1 is live.*ValueError"), worker(site, settings) as loop:
        assert loop.update.guards is not None and loop.update.rehearsal is not None
        holder, name = {
            "guards": (loop.update.guards, "remember"),
            "journal": (loop.session.manager, "after"),
            "rehearsal": (loop.update.rehearsal, "add"),
        }[part]
        monkeypatch.setattr(holder, name, broken)
        loop.run()
    assert site.header()["version"] == 1 and site.served()["state"] == "serving" and site.producer.version() == 0
    site.work(*QUIET)
    assert sorted(site.trained()) == ["x-0", "x-1"] and site.agree() == 2


def test_a_header_that_cannot_be_finished_tears(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writes are done, and nobody may be told so: no exception that means "nothing was touched" comes out."""
    with open_session(site.run_dir, "here", H, state_dir=site.state) as session:
        update = LiveUpdate(session)

        def broken(version: int) -> None:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(session.weights.header, "finish", broken)
        with pytest.raises(TornWeightsError, match="version 1 broke off"):
            update.run(ready(update, "x"))
        assert session.weights.header.state == APPLYING
    site.is_torn()


def test_the_weights_decide_what_a_refused_batch_leaves(site: Site) -> None:
    """An outlier by its norm: nothing is journaled, nothing is written, and the guards' memory stays as it was."""
    with open_session(site.run_dir, "here", H, state_dir=site.state) as session:
        guards = Guards(minimum=4)
        update = LiveUpdate(session, guards=guards)
        guards.remember([Guards.measures({}, 1e-9, 1e9)] * 4)
        before = site.everything()
        found = update.run(ready(update, "x")[:1])
        assert found.version is None and "norm" in found.rejected["x-0"] and session.manager.history.latest() is None
        assert site.everything() == before and len(guards.norms.values) == 4
