"""Updates that the backward pass applies, in a worker: the weights of a burst, and what a crash in the middle leaves.

Redis and the worker are real; the server is the stand-in (tests/helpers/stand_in.py): its memory and sockets are real.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from durable_parts import QUIET, Site, transcripts
from torch.utils.hooks import RemovableHandle

from producer.transcript import Transcript
from worker.apollo import ApolloMini, NonFiniteGradientError
from worker.checkpoint.batch_codec import Ready
from worker.checkpoint.snapshots import Trained
from worker.cli.worker import command as worker_command
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import TornWeightsError
from worker.config.update_options import Apply, ApplySettings
from worker.data.examples import Example
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.recovery import mend_weights
from worker.orchestrator.reports import sentence
from worker.orchestrator.session import open_session
from worker.serving.control_client import ServerControl
from worker.shared_weights.header import APPLYING
from worker.trainer.gradients import Gradients
from worker.trainer.trainer import Trainer

STREAMING = ("--apply", "streaming")
FACTORS = ("--apply", "factors")
H = Hyperparameters(lr=3e-4, max_length=512)
pytestmark = pytest.mark.usefixtures("as_it_was")


def send(site: Site) -> None:
    """Four transcripts that count differently: for two versions."""
    weights = (1.0, 0.5, 0.25, 1e-3)
    site.producer.enqueue_many([item | {"weight": w} for item, w in zip(transcripts("x", 4), weights, strict=True)])


@pytest.fixture(scope="module")
def burst(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Weights, optimizer's state and step count after two versions of two transcripts each, by bursts."""
    site = Site(tmp_path_factory.mktemp("burst"), tiny_model)
    send(site)
    site.work(*QUIET)
    assert site.agree() == 2 and site.manifest(2)["way"] == "burst" and "forward_s" not in site.manifest(2)
    assert 0 < float(site.manifest(2)["step_scale"]) < 0.5, "the mean weight of a token"
    yield site.everything()
    site.close()


@pytest.mark.parametrize("way", ["streaming", "hogwild"])
def test_a_streaming_worker_makes_the_weights_of_a_burst(site: Site, burst: tuple[str, int], way: str) -> None:
    send(site)
    site.work(*QUIET, *STREAMING, *(["--hogwild"] if way == "hogwild" else []))
    assert site.agree() == 2 and site.everything() == burst
    manifest = site.manifest(2)
    assert manifest["way"] == way and "gradient_norm" not in manifest, "there is no norm before the write"
    parts = {name: float(manifest[name]) for name in ("forward_s", "backward_s", "sweep_s", "pause_s")}
    assert all(seconds > 0 for seconds in parts.values()) and float(manifest["wait_for_pause_s"]) > 0
    assert parts["backward_s"] < parts["sweep_s"] and (parts["sweep_s"] < parts["pause_s"]) == (way == "streaming")


def test_a_worker_by_factors_makes_the_weights_of_a_burst(site: Site, burst: tuple[str, int]) -> None:
    """Killed in its second write, and replayed in its own way; the norm is known before, as in a burst."""
    send(site)
    site.killed("applying:2", *QUIET, *FACTORS)
    site.is_torn()
    said = site.work(*QUIET, *FACTORS)
    assert site.agree() == 2 and len(site.ledger()) == 4 and site.everything() == burst, said
    assert site.manifest(2)["way"] == "factors"
    manifest = site.manifest(1)  # of the one that was not interrupted
    assert manifest["way"] == "factors" and float(manifest["gradient_norm"]) > 0
    assert "backward_s" not in manifest and 0 < float(manifest["sweep_s"]) < float(manifest["pause_s"])


@pytest.mark.parametrize("point", ["paused", "applying", "swept", "applied"])
def test_a_streaming_worker_killed_anywhere_costs_nothing(site: Site, burst: tuple[str, int], point: str) -> None:
    send(site)
    more = [] if point == "applying" else ["--hogwild"]
    site.killed(f"{point}:2", *QUIET, *STREAMING, *more)
    if point in ("applying", "swept"):
        site.is_torn()
        assert site.header()["state"] == APPLYING and "version 2" in site.served()["reason"]
    said = site.work(*QUIET, *STREAMING, *more)
    assert site.agree() == 2 and len(site.ledger()) == 4 and site.everything() == burst, said


@pytest.mark.parametrize("way", [STREAMING, FACTORS])
def test_a_version_is_made_again_in_the_way_it_was_made(site: Site, way: tuple[str, str]) -> None:
    """Over several forward passes the ways differ in the last bits; a replay goes the journal's way."""
    sent = transcripts("x", 6)
    for i, item in enumerate(sent):
        item["messages"][0]["content"] *= (1, 12, 24)[i % 3]  # rows of three widths: three forward passes
    site.producer.enqueue_many(sent[:3])
    site.work(*QUIET, jobs=3)
    site.producer.enqueue_many(sent[3:])
    site.work(*QUIET, *way, jobs=3)
    before = site.everything()
    site.restart_server()
    said = site.work(*QUIET, *way)
    assert "2 journaled batches" in said and "bit for bit what they were" in said
    assert site.agree() == 2 and site.everything() == before


def spoil(trainer: Trainer, error: Exception | None = None) -> RemovableHandle:
    """From now on the last gradient that backward makes is not finite, or never comes."""

    def change(gradient: torch.Tensor) -> torch.Tensor:
        if error is not None:
            raise error
        return gradient * float("inf")

    # The tiny model fits into one bucket: without any, all else is written by then.
    trainer.optimizer.streaming = partial(ApolloMini.streaming, trainer.optimizer, 0)  # type: ignore[method-assign]

    def watch(_: torch.nn.Module, __: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.register_hook(change)  # of what the table gave: by factors the table itself has no gradient

    handle: RemovableHandle = trainer.model.get_input_embeddings().register_forward_hook(watch)
    return handle


def ready(step: LiveUpdate, prefix: str) -> list[Ready]:
    return [step.prepare(item["id"], Transcript.from_dict(item)) for item in transcripts(prefix, 2)]


def test_a_gradient_that_is_not_finite_tears_in_streaming_and_is_not_tried_again(site: Site) -> None:
    before, streaming = site.digest(), ApplySettings("streaming")
    with open_session(site.run_dir, "test", H, state_dir=site.state, settings=streaming) as session:
        step = LiveUpdate(session)
        session.manager.adopt(0, session.weights.header.lineage, Trained({}, {}))
        spoil(session.trainer)
        with pytest.raises(TornWeightsError, match=r"embed_tokens.*not finite.*start the worker again"):
            step.run(ready(step, "x"))
        assert session.weights.header.state == APPLYING and 1 not in session.manager.journal.entries
        with pytest.raises(TornWeightsError):
            step.run(ready(step, "x"))
    site.is_torn()
    assert site.digest() != before
    with open_session(site.run_dir, "test", H, state_dir=site.state, settings=streaming) as session:
        step = LiveUpdate(session)
        assert site.digest() == before and site.served()["state"] == "serving"
        assert step.run(ready(step, "y")).version == 1


def test_recovery_leaves_out_what_is_not_finite_and_the_half_that_it_wrote_of_it(site: Site) -> None:
    streaming = ApplySettings("streaming")
    with open_session(site.run_dir, "test", H, state_dir=site.state, settings=streaming) as session:
        step = LiveUpdate(session)
        session.manager.adopt(0, session.weights.header.lineage, Trained({}, {}))
        assert step.run(ready(step, "x")).version == 1
        before = site.everything()
        broken = spoil(session.trainer, RuntimeError("the device is lost"))
        with pytest.raises(TornWeightsError, match=r"version 2 broke off.*device is lost.*start the worker again"):
            step.run(ready(step, "y"))
        broken.remove()
        session.control.close()
        site.is_torn()
        assert site.everything() != before and session.manager.history.latest() == (2, session.weights.header.lineage)
        make, spoiled = session.manager.rebuilder.make_trainer, []

        def make_spoiled(h: Hyperparameters) -> Trainer:
            """One that meets the second batch's gradient as the first time."""
            trainer = make(h)
            begin = trainer.begin

            def begin_spoiled(examples: list[Example], **rule: Any) -> Gradients:
                while spoiled:
                    spoiled.pop().remove()
                if examples[0].id.startswith("y"):
                    spoiled.append(spoil(trainer))
                return begin(examples, **rule)

            trainer.begin = begin_spoiled  # type: ignore[method-assign, assignment]
            return trainer

        session.manager.rebuilder.make_trainer = make_spoiled
        with ServerControl(site.run_dir, "next") as control:
            said = mend_weights(session.manager, control, None)
    assert any("version 2 has a gradient that is not finite" in text for text in map(sentence, said))
    assert site.everything() == before and site.header()["version"] == 1 and site.served()["state"] == "serving"


@pytest.mark.parametrize("way", ["burst", "factors"])
def test_a_gradient_that_is_not_finite_changes_nothing_where_all_are_known(
    site: Site, way: Apply, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By factors the server is not even paused for it."""
    before = site.digest()
    with open_session(site.run_dir, "test", H, state_dir=site.state, settings=ApplySettings(way)) as session:
        paused: list[int] = []
        pause = session.control.pause
        monkeypatch.setattr(session.control, "pause", lambda **more: (paused.append(1), pause(**more))[1])
        step = LiveUpdate(session)
        spoiled = spoil(session.trainer)
        with pytest.raises(NonFiniteGradientError, match="embed_tokens"):
            step.run(ready(step, "x"))
        assert site.digest() == before and site.served()["state"] == "serving"
        assert len(paused) == (0 if way == "factors" else 1)
        spoiled.remove()
        assert step.run(ready(step, "x")).version == 1


@pytest.mark.parametrize(
    "arguments",
    [["--hogwild"], ["--hogwild", "--apply", "burst"], ["--duty-cycle", "0"], ["--serving-share", "1"]],
)
def test_flags_that_make_no_sense_are_refused_by_name(arguments: list[str]) -> None:
    result = CliRunner().invoke(worker_command, arguments)
    assert result.exit_code != 0 and arguments[0] in f"{result.output}{result.exception}"
