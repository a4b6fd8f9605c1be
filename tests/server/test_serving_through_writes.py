"""Streaming and hogwild beside a real vLLM: what its clients see during a write, and after one that was cut off.

The tests run in order on one server.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from durable_parts import QUIET, Site, transcripts
from patience import PATIENCE, until
from serving_parts import Background, EndlessClient, completion, events, inside, metric

from producer.transcript import Transcript
from worker.checkpoint.file_digests import fingerprint
from worker.checkpoint.journal import Journal
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.orchestrator.live_update import LiveUpdate
from worker.orchestrator.session import open_session
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import attach
from worker.shared_weights.header import APPLYING, CLEAN
from worker.utils.child_process import die_with_parent

pytestmark = pytest.mark.server

STREAMING = ("--apply", "streaming")


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Trained by the factored rule: the other tests with real vLLM go by the default."""
    running = Site(tmp_path_factory.mktemp("apply"), tiny_model, real=True, optimizer="factored")
    yield running
    running.close()


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """A worker in this process has torch choose algorithms that repeat; the other tests never asked for them."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def test_a_streaming_worker_teaches_the_running_server(site: Site) -> None:
    running = Background(site.server.process, 200, stream=False)
    site.send("streamed", 4)
    site.work(*QUIET, *STREAMING)
    assert site.agree() == 2 and [site.manifest(version)["way"] for version in (1, 2)] == ["streaming"] * 2
    assert site.manifest(2)["optimizer"] == site.served()["optimizer"] == "factored"
    assert running.result()[0] == 200
    assert completion(site.server.process, 2)[1]["x-weight-version"] == "2"


@pytest.mark.slow  # it wants two cores for itself
def test_a_version_is_made_beside_a_client_that_streams_without_end(site: Site) -> None:
    """By a worker of its own choice of threads, in a process of its own, as a user would start it."""
    before, server = site.header()["version"], site.server.process
    preempted = metric(server, "vllm:num_preemptions_total")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "REDIS_URL": site.store.url}
    environment |= {"TANDEM_RUN_DIR": str(site.run_dir), "TANDEM_STATE_DIR": str(site.state)}
    site.send("busy", 1)
    with EndlessClient(server, 1500, 2500) as client:
        command = [sys.executable, "-m", "worker.cli", "worker", "--until-empty", "--max-length", "512", *QUIET]
        done = subprocess.run(  # a session of its own, as in another terminal: Linux shares CPUs out by session
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE,
            preexec_fn=die_with_parent, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert site.agree() == before + 1
    assert metric(server, "vllm:num_preemptions_total") == preempted, "the running request was thrown back"
    spans = [events(body)[-1].removeprefix(": weight-version ") for body in client.answers]
    assert set(spans) <= {f"{before}", f"{before}-{before + 1}", f"{before + 1}"}
    assert spans[-1].endswith(str(before + 1))
    record = Journal(site.state / "journal", fingerprint(site.model)).read(before + 1)
    assert record.facts["threads"] == 1, "the server needs one of two CPUs, or more"


@pytest.mark.parametrize("options", [STREAMING, (*STREAMING, "--hogwild")], ids=["streaming", "hogwild"])
@pytest.mark.parametrize("point", ["applying", "swept"])
def test_torn_weights_are_never_served_and_the_next_worker_mends_them(
    site: Site, point: str, options: tuple[str, ...]
) -> None:
    """With hogwild the server was never paused: it stops serving all the same."""
    before = site.agree()
    sent = site.send(f"{point}-{len(options)}", 2)
    site.killed(point, *QUIET, *options)
    site.is_torn()
    assert site.header()["state"] == APPLYING
    status, _, body = completion(site.server.process, 2)
    assert status == 503 and "tandem worker" in json.loads(body)["error"]["message"], body
    said = site.work(*QUIET, *options)
    assert "torn" in said and site.agree() == before + 1 and set(sent) <= set(site.ledger())
    status, headers, _ = completion(site.server.process, 2)
    assert (status, headers["x-weight-version"]) == (200, str(before + 1))


def test_who_is_being_answered_when_hogwild_tears_the_weights_is_told(site: Site) -> None:
    before, server = site.agree(), site.server.process
    header = attach(site.run_dir).header
    control = ServerControl(site.run_dir, "lost")
    control.connect()
    stream, whole = inside(
        server,
        True,
        False,
        at=control.begin_hogwild,
        undo=lambda: (control.pause(), control.resume(before)),
        tokens=4000,
    )
    header.begin(control.fence)
    control.close()  # as the end of its process does, which a busy machine may put off
    site.is_torn()
    reason = site.served()["reason"]
    assert f"ended while it wrote version {before + 1}" in reason
    assert reason in events(stream.result()[2])[-2]
    status, _, body = whole.result()
    assert status == 503 and reason.encode() in body
    site.work(*QUIET)
    assert site.agree() == before and completion(server, 2)[0] == 200


def test_a_version_costs_what_it_took_from_requests_that_ran(site: Site) -> None:
    """And nothing where none ran."""
    h = Hyperparameters(lr=3e-4, max_length=512)
    with open_session(site.run_dir, "test", h, state_dir=site.state) as session:
        step = LiveUpdate(session)
        made: list[dict[str, Any]] = []

        def version() -> None:
            text, started = transcripts(f"cost{len(made)}", 1)[0], time.monotonic()
            manifest = step.run([step.prepare(text["id"], Transcript.from_dict(text))]).manifest
            made.append(manifest | {"elapsed": time.monotonic() - started})

        until(lambda: step.cost.look() == 0, "vLLM holds no request of an earlier test")
        version()
        assert (made[0]["serving_cost_s"], made[0]["running_requests"]) == (0, 0)
        (stream,) = inside(site.server.process, True, at=version, undo=lambda: None, tokens=1500)
        busy = made[-1]
        # More than what stood still: CPU time, which is not more than the cores had of it.
        assert busy["running_requests"] == 1 and busy["sweep_s"] < busy["serving_cost_s"] <= busy["elapsed"]
        assert stream.result()[0] == 200
    site.work(*QUIET)  # commits them
    site.agree()


def test_hogwild_answers_while_it_writes(site: Site) -> None:
    """Asked from inside the backward pass, between two writes."""
    before = site.agree()
    settings, h = ApplySettings("streaming", hogwild=True), Hyperparameters(lr=3e-4, max_length=512)
    answers, states = [], []
    with open_session(site.run_dir, "test", h, state_dir=site.state, settings=settings) as session:
        step = LiveUpdate(session)

        def ask(gradient: torch.Tensor) -> None:
            states.append((session.weights.header.state, site.served()["written"]))
            answers.append(completion(site.server.process, 2))

        for layer in session.trainer.model.model.layers:
            layer.mlp.up_proj.weight.register_hook(ask)
        sent = [step.prepare(item["id"], Transcript.from_dict(item)) for item in transcripts("wild", 2)]
        update = step.run(sent)
        assert update.version == before + 1 and session.weights.header.state == CLEAN
    assert len(answers) >= 2 and set(states) == {(APPLYING, before + 1)}
    assert {(status, headers["x-weight-version"]) for status, headers, _ in answers} == {
        (200, f"{before}-{before + 1}")
    }
    assert 0 < update.manifest["pause_s"] < update.manifest["sweep_s"] and update.manifest["way"] == "hogwild"
    assert completion(site.server.process, 2)[1]["x-weight-version"] == str(before + 1)
    site.work(*QUIET)  # commits it
    assert site.agree() == before + 1 and site.manifest(before + 1)["way"] == "hogwild"
