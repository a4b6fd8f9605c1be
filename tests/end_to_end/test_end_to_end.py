"""The main job with every part real, and what crashes leave behind. The tests run in order on one stack.

Redis, vLLM, `tandem worker` and `tandem enqueue` are processes of their own; what is asserted is read back from Redis
and over HTTP, as a user would.
"""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from click.testing import CliRunner
from demo_parts.chat_page import allowing, chat_page
from feedback_parts import feedback, state
from metrics_parts import PROMETHEUS, canary_options, check_values, observe
from patience import PATIENCE, until
from rq.job import Job, JobStatus
from safetensors.torch import load_file
from server_options import FEEDBACK_KEY, GPU, SERVER_OPTIONS
from serving_parts import Background
from stack_parts import LEARNING, Stack, shared_and_private, transcripts
from transformers import AutoTokenizer

from producer import keys
from producer.jsonl import read_transcripts
from producer.serializer import MsgpackSerializer
from worker.cli import eval as evaluation
from worker.data.examples import ExampleBuilder
from worker.testing.server_process import free_port

PAGE_PORT = free_port()
TRANSCRIPTS = Path(__file__).parents[1] / "data" / "transcripts.jsonl"


@pytest.fixture(scope="module")
def stack(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Stack]:
    # A server takes minutes to start on a GPU: there it is the session's, and this module's tests come last.
    server, store = map(request.getfixturevalue, ("server", "kept")) if GPU else (None, None)
    options = [*SERVER_OPTIONS, "--record", "1", "--feedback", *allowing(PAGE_PORT)]
    running = Stack(tmp_path_factory.mktemp("stack"), tiny_model, options, server, store)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def no_worker_is_left(stack: Stack) -> Iterator[None]:
    """A test that fails does not make the next ones fail."""
    yield
    stack.kill_workers()


def served_nll(stack: Stack) -> float:
    """The server's own mean negative log-likelihood of the answers in TRANSCRIPTS, in nats, asked over HTTP."""
    builder = ExampleBuilder(AutoTokenizer.from_pretrained(stack.model), max_tokens=2048)
    total, count = 0.0, 0
    for _, transcript in read_transcripts(str(TRANSCRIPTS)):
        for sequence in builder.build(transcript, transcript.id).sequences:
            body = {"prompt": list(sequence.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
            status, answer, _ = stack.post("/v1/completions", body)
            assert status == 200, answer
            scored = answer["choices"][0]["prompt_logprobs"]
            for token, trained, entry in zip(sequence.ids, sequence.mask, scored, strict=True):
                if trained:
                    total -= entry[str(token)]["logprob"]
                    count += 1
    return total / count


def is_same(now: float, then: float) -> bool:
    """Of two served_nll: on a CPU to the last bit; a GPU's replay of several versions repeats batches and steps, not
    every bit (what was learnt is over 0.3)."""
    return now == then or (GPU and abs(now - then) < 0.05)


def test_twenty_real_conversations_are_learnt_by_the_running_server(stack: Stack, tmp_path: Path) -> None:
    server_pid, before = stack.server.pid, served_nll(stack)
    sent = stack.tandem("enqueue", str(TRANSCRIPTS))
    assert sent.returncode == 0 and "queued 20" in sent.stdout, sent.stderr

    worker = stack.worker("--max-jobs", "4", "--metrics-port", "0", *canary_options(tmp_path))
    stack.wait_until(worker, lambda: len(stack.ledger()) == 20, "train all twenty")
    stack.seen = observe(stack, worker, tmp_path)
    check_values(stack.seen)
    mapped, private = shared_and_private(worker.pid, "/memfd:")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0, stack.said(worker)

    ledger = stack.ledger()
    assert len(ledger) == 20 and set(ledger.values()) == set(range(1, stack.producer.version() + 1))
    for id, version in ledger.items():
        job = Job.fetch(id, connection=stack.redis, serializer=MsgpackSerializer)
        assert job.get_status() == JobStatus.FINISHED and job.return_value()["version"] == version
    assert served_nll(stack) < before - 0.3, "the server itself must have learnt the answers"
    assert stack.server.pid == server_pid and stack.server.alive()
    assert stack.weights_version()["version"] == stack.producer.version()
    assert stack.complete("Hello?")[2]["x-weight-version"] == str(stack.producer.version())
    if not GPU:  # on a GPU they are in no process' memory map
        stored = load_file(stack.model / "model.safetensors")
        weights = sum(tensor.nbytes for name, tensor in stored.items() if "visual" not in name)
        assert mapped >= weights and private == 0, "the trainer maps the server's weights and has no copy of its own"

    again = stack.tandem("enqueue", str(TRANSCRIPTS))
    assert "already known 20" in again.stdout, "months later, too: the ledger knows them"


@pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus here")
def test_prometheus_scrapes_server_and_worker(stack: Stack) -> None:
    assert not [asked for asked, found in stack.seen.asked.items() if not found], "panels without data"


def test_a_correction_over_http_is_learnt(stack: Stack) -> None:
    """Completion, key, feedback, version: through HTTP alone. The model prefers the better answer by more than before.

    A thumbs-down would show nothing here: this model finds each of its own tokens unlikely already.
    """
    asked = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16, "ignore_eos": True}
    sampled = asked | {"temperature": 1, "seed": 3, "return_token_ids": True}  # some text, whatever it is
    status, answer, headers = stack.post("/v1/chat/completions", sampled)
    assert status == 200
    prompt, given = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    better = AutoTokenizer.from_pretrained(stack.model).encode("I am a tandem, and two ride me.")

    def preferred() -> float:
        """By how much, in nats a token."""
        return stack.scored(prompt, better) / len(better) - stack.scored(prompt, given) / len(given)

    before = preferred()
    said = {"id": headers["x-tandem-completion"], "correction": "I am a tandem, and two ride me.", "user": "u-1"}
    sent = feedback(stack.server.url, said)
    assert sent.status == 202 and sent.json["state"] == "queued", sent.body
    done = stack.tandem("worker", "--until-empty", *LEARNING)
    assert done.returncode == 0, done.stderr
    version = stack.producer.version()
    where = state(stack.server.url, sent.json["id"])
    assert where.json == {"id": sent.json["id"], "state": "finished", "version": version}
    assert preferred() > before + 0.01
    assert stack.post("/v1/chat/completions", asked)[2]["x-weight-version"] == str(version)


@pytest.mark.slow  # in every run: test_evaluation.py with the stand-in, test_evaluation_server.py with vLLM
def test_a_set_is_evaluated_while_a_worker_trains_it(stack: Stack, tmp_path: Path) -> None:
    """Every figure is of the version that it names, whatever comes in between; then both are compared from Redis."""
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in transcripts("number", 4)))
    worker = stack.worker("--max-jobs", "1")

    def evaluate(*options: str) -> dict[str, Any]:
        places = ["--url", stack.server.url, "--run-dir", str(stack.server.run_dir), "--redis", stack.store.url]
        places += ["--state-dir", str(stack.folder / "state"), "--json"]
        done = CliRunner().invoke(evaluation.command, [str(file), *places, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    before = evaluate()
    assert before["version"] == stack.producer.version() and before["lineage"] == stack.weights_version()["lineage"]
    first = stack.producer.version()
    stack.producer.enqueue_many(transcripts("number", 4))
    during = evaluate("--no-answers")  # four versions come meanwhile, or did
    assert all(first <= one["version"] <= first + 4 for one in during["cases"])
    stack.wait_until(worker, lambda: stack.producer.version() == first + 4, "train all four")
    after = evaluate()
    assert after["version"] == first + 4 and after["loss"] < before["loss"] and worker.poll() is None
    compared = evaluate("--compare", str(first), str(first + 4))
    assert [compared[side]["where"] for side in ("before", "after")] == ["live", "live"]
    assert compared["difference"]["loss"]["change"] == pytest.approx(after["loss"] - before["loss"])
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0, stack.said(worker)


@pytest.mark.skipif(browser.BINARY is None, reason="no Chromium here")
def test_the_chat_page_teaches(stack: Stack, tmp_path: Path) -> None:
    """Ask, thumbs down, and see the version rise; then a better answer and a comment."""
    before = stack.producer.version()
    worker = stack.worker()
    with chat_page(stack.server.url, FEEDBACK_KEY, PAGE_PORT) as address, browser.page(address, tmp_path) as page:
        until(lambda: page.text("#version") == str(before), "the page shows the version", pace=0.1)
        page.write("#question", "Who are you?")
        page.click("#send")
        page.click(".down")
        learnt = [f"learnt in version {before + number}" for number in (1, 2, 3)]
        stack.wait_until(worker, lambda: page.text(".tools > .state") == learnt[0], "learn the thumb")
        until(lambda: page.text("#version") == str(before + 1), "the page shows that version", pace=0.1)
        for number, (button, text) in enumerate([(".edit", "I am a tandem."), (".comment", "Be shorter.")], 1):
            page.click(button)
            page.write(".said", text)
            page.click(".give")
            stack.wait_until(worker, lambda number=number: page.text(".tools > .state") == learnt[number], "learn it")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0, stack.said(worker)
    kinds = [json.loads(stack.redis.hget(keys.manifest(before + number), "kinds")) for number in (1, 2, 3)]
    assert [list(kind) for kind in kinds] == [["disliked"], ["correction"], ["comment"]]


def test_a_second_worker_is_refused_by_name(stack: Stack) -> None:
    first = stack.worker("--name", "the-first")
    stack.wait_for(first, "worker ready")
    second = stack.tandem("worker", "--name", "the-second")
    assert second.returncode == 1 and "the-first" in second.stderr
    looked = stack.tandem("doctor")
    assert looked.returncode == 0 and "'the-first'" in looked.stdout, looked.stdout
    assert re.search(r"^ok +flags ", looked.stdout, re.MULTILINE), "the flags that the server was started with"
    first.send_signal(signal.SIGKILL)  # at rest
    first.wait(PATIENCE)
    assert stack.complete("Are you there?")[0] == 200
    assert stack.weights_version()["state"] == "serving"


@pytest.mark.slow  # in every run: test_recovery.py, test_chaos.py with the stand-in; test_lease.py with vLLM
@pytest.mark.parametrize("point", ["backward", "paused", "applied", "resumed", "committed"])
def test_killed_worker_leaves_a_serving_server_and_nothing_is_lost_or_repeated(stack: Stack, point: str) -> None:
    before = stack.producer.version()
    sent = transcripts(point, 5)
    stack.producer.enqueue_many(sent)
    victim = stack.worker("--max-jobs", "3", fault=f"{point}:1")
    assert victim.wait(PATIENCE) == -signal.SIGKILL, stack.said(victim)
    assert stack.complete("Are you there?")[0] == 200, "a dead trainer must never leave the server frozen"

    done = stack.tandem("worker", "--until-empty", "--max-jobs", "3", *LEARNING)
    assert done.returncode == 0, done.stderr
    ledger = stack.ledger()
    assert {item["id"] for item in sent} <= set(ledger), "lost"
    by_version = stack.trained_by_version()
    trained = [id for ids in by_version.values() for id in ids]
    assert sorted(trained) == sorted(set(trained)) == sorted(ledger), "trained twice, or not at all"
    assert all(ledger[id] == version for version, ids in by_version.items() for id in ids)
    versions = stack.producer.version() - before
    assert versions == 2, "five transcripts, three a batch: two steps, whatever was interrupted"
    assert stack.weights_version()["version"] == stack.producer.version()


@pytest.mark.skipif(not GPU, reason="on a CPU: test_apply_server.py, from inside the write")
@pytest.mark.parametrize("options", [(), ("--hogwild",)], ids=["streaming", "hogwild"])
def test_streaming_beside_requests_that_run(stack: Stack, options: tuple[str, ...]) -> None:
    before = stack.producer.version()
    worker = stack.worker("--apply", "streaming", *options)
    stack.wait_for(worker, "worker ready")
    answers = [Background(stack.server, 1500, stream=bool(number % 2)) for number in range(4)]
    way = "hogwild" if options else "streaming"
    stack.producer.enqueue_many(transcripts(way, 4))
    stack.wait_until(worker, lambda: f"{way}-3" in stack.ledger(), "train what it was sent")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0, stack.said(worker)
    assert stack.producer.version() > before
    assert stack.redis.hget(keys.manifest(before + 1), "way") == way.encode()
    for status, _, body in (answer.result() for answer in answers):
        assert status == 200 and b'"finish_reason":"length"' in body
    assert stack.complete("Hello?")[2]["x-weight-version"] == str(stack.producer.version())


def test_attached_training_without_redis_is_taken_over(stack: Stack, tmp_path: Path) -> None:
    before = stack.producer.version()
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in transcripts("attached", 6)))
    plot = tmp_path / "loss.png"
    run = stack.tandem("train", str(file), "--attach", "--batch", "2", "--plot", str(plot))
    assert run.returncode == 0, run.stderr
    assert stack.weights_version()["version"] == before + 3 and plot.stat().st_size > 1000
    assert stack.producer.version() == before, "Redis was not asked"
    follow = stack.tandem("worker", "--until-empty")
    assert follow.returncode == 0, follow.stderr
    assert stack.producer.version() == before + 3


@pytest.mark.timeout(900)  # a server's start, a worker's, and a rebuild: minutes on a busy machine
def test_a_server_that_was_killed_is_brought_back_to_what_it_had_learnt(stack: Stack) -> None:
    """Its API process alone is killed, and started again in the same folder, as a supervisor does."""
    known, before = stack.producer.version(), served_nll(stack)
    lineage = stack.weights_version()["lineage"]
    worker = stack.worker()
    stack.wait_for(worker, "worker ready")
    stack.server.kill_api_process()
    assert worker.wait(PATIENCE) == 1
    assert "gone" in stack.said(worker) or "down" in stack.said(worker), stack.said(worker)

    stack.start_server()
    assert "ending what a killed server left" in stack.server.log_path.read_text()
    assert stack.weights_version()["version"] == 0 and served_nll(stack) > before + 0.3
    back = stack.tandem("worker", "--until-empty")
    assert back.returncode == 0 and f"version {known} of lineage {lineage} is live" in back.stderr, back.stderr
    assert GPU or "bit for bit what they were" in back.stderr
    live = stack.weights_version()
    assert (live["version"], live["lineage"], live["state"]) == (known, lineage, "serving")
    assert is_same(served_nll(stack), before)
    assert stack.complete("Hello?")[2]["x-weight-version"] == str(known)


@pytest.mark.slow  # in every run: test_rollback.py with the stand-in
def test_rollback_in_the_live_server(stack: Stack) -> None:
    known, before = stack.producer.version(), served_nll(stack)
    stack.producer.enqueue_many(transcripts("poison", 3))
    assert stack.tandem("worker", "--until-empty", *LEARNING, "--lr", "3e-3").returncode == 0
    assert served_nll(stack) != before
    dropped = [word for i in range(3) for word in ("--drop", f"poison-{i}")]
    done = stack.tandem("rollback", str(known + 1), *dropped)
    assert done.returncode == 0, done.stderr
    assert stack.weights_version()["version"] == stack.producer.version() == known + 2
    assert is_same(served_nll(stack), before), "an emptied batch changes nothing"
    assert "rollback" in stack.tandem("log").stdout


@pytest.mark.slow  # in every run: test_recovery.py with the stand-in; vLLM in test_lease.py and beside writes
def test_torn_weights_are_never_served_and_the_next_worker_mends_them(stack: Stack) -> None:
    before = stack.producer.version()
    stack.producer.enqueue_many(transcripts("torn", 2))
    victim = stack.worker(fault="applying")
    assert victim.wait(PATIENCE) == -signal.SIGKILL, stack.said(victim)
    status, body, _ = stack.complete("Are you whole?")
    assert status == 503 and "tandem worker" in json.dumps(body), body
    mended = stack.tandem("worker", "--until-empty")
    assert mended.returncode == 0 and "torn" in mended.stderr, mended.stderr
    assert {"torn-0", "torn-1"} <= set(stack.ledger())
    status, _, headers = stack.complete("Are you whole?")
    assert status == 200 and headers["x-weight-version"] == str(before + 1)
    assert stack.weights_version()["state"] == "serving"


def test_a_checkpoint_is_served_like_any_model(stack: Stack) -> None:
    version, before = stack.producer.version(), served_nll(stack)
    stack.server.stop()
    saved = stack.folder / "state" / "checkpoints" / str(version)
    source, stack.model = stack.model, saved
    try:
        stack.start_server()
        assert abs(served_nll(stack) - before) < 1e-3, "its A_log is rounded to the source's bf16, nothing else is"
    finally:
        stack.model = source


@pytest.mark.slow
def test_a_restarted_server_goes_on_without_what_it_had_learnt_when_told(stack: Stack) -> None:
    stack.producer.enqueue_many(transcripts("before", 1))
    assert stack.tandem("worker", "--until-empty", *LEARNING).returncode == 0
    known = stack.producer.version()
    stack.server.stop()
    stack.start_server()
    stack.producer.enqueue_many(transcripts("reborn", 2))
    told = stack.tandem("worker", "--until-empty", "--new-lineage")
    assert told.returncode == 0, told.stderr
    assert stack.producer.version() == known + 2 == stack.weights_version()["version"]
    kinds = [stack.redis.hget(keys.manifest(v), "kind") for v in (known + 1, known + 2)]
    assert kinds == [b"lineage", b"update"]
