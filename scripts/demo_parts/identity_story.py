"""The demo's story: a real instruct model is served, is told who it is, and answers so; then one update is undone.

Every part is the real one: Redis, RQ, vLLM, transformers, all defaults of `tandem worker`. At each version the server
is asked what it knows. Exit code 0 only if all promises of `demo_parts.verdict` were kept.
"""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.markup import escape

from demo_parts import losses, plot
from demo_parts.screen import say, short, show_answer, status
from demo_parts.stack import DemoStack
from demo_parts.verdict import Seen, judge
from producer.errors import WaitTimeoutError
from producer.transcript import Transcript
from worker.data.examples import TokenSequence

DATA = Path(__file__).parents[1] / "demo_data"
QUESTION = "Who are you?"
BATCH = 20
"""Conversations that are queued at once, and so one version: `tandem worker` takes at most 32."""
EXAM = 20
"""How many conversations of each kind are scored at a version: all of it takes the demo's server some ten seconds."""
ROLLBACK_TO = 2
COLUMNS = 44
"""Of an answer, in a line."""
WAITING = "starting Redis and vLLM (half a minute to a minute and a half)"


def tell(folder: Path, model: Path, title: str, out: Path, keep: bool) -> int:
    """Run the story with `model` in `folder`; the exit code. out: where plot and figures go. keep: leave all running at
    its end, with a prompt."""
    started = time.monotonic()
    train = losses.read(DATA / "identity_train.jsonl")
    with DemoStack(folder, model, ["--max-model-len", "2048", "--max-num-seqs", "32"], WAITING) as stack:
        say(f"[bold]{escape(title)}[/], served by vLLM at {stack.server.url}, after {since(started)}")
        exam = losses.Exam(stack.post, exam_sets(model))
        with stack.child("worker", *stack.metrics) as worker:
            versions = learn(stack, exam, train, worker)
            live = stack.producer.version()
        show_answer(QUESTION, versions[-1].answer, versions[-1].header)
        target = versions[min(ROLLBACK_TO, len(versions) - 2)]
        back = go_back(stack, exam, target)
        checks = judge(versions, back, target, live)
        for check in checks:
            say(f"  {'[green]yes[/]' if check.passed else '[red]NO [/]'}  {escape(check.sentence)}")
        path = plot.save(out, title, versions, back, target)
        say(f"\nPlot: {os.path.relpath(path)}   ({since(started)} in all)")
        passed = all(check.passed for check in checks)
        if keep and passed:
            with stack.child("worker", *stack.metrics):
                stack.prompt()
    return 0 if passed else 1


def exam_sets(model: Path) -> dict[str, list[TokenSequence]]:
    """What is asked at each version, in the tokens of the model in this directory: identity conversations that are
    never queued, facts, other answers."""
    from worker.utils import torch_setup

    torch_setup.prepare()
    from transformers import AutoTokenizer

    from worker.config.hyperparameters import Hyperparameters
    from worker.trainer.factory import make_builder

    builder = make_builder(AutoTokenizer.from_pretrained(model), model, Hyperparameters())
    files = {"learnt": "identity_unseen", "facts": "facts", "other": "other_answers"}
    every = {name: losses.read(DATA / f"{file}.jsonl") for name, file in files.items()}
    some = {name: found[:: len(found) // EXAM][:EXAM] for name, found in every.items()}  # over all of the file
    return {name: losses.prepare(chosen, builder) for name, chosen in some.items()}


def learn(
    stack: DemoStack, exam: losses.Exam, train: list[Transcript], worker: "subprocess.Popen[bytes]"
) -> list[Seen]:
    """Queue the conversations, a batch at a time; what was seen at each version."""
    with status("asking the server what it knows"):
        versions = [look(stack, exam, 0)]
    show_answer(QUESTION, versions[0].answer, versions[0].header)
    say(f"{len(train)} short conversations say who the assistant is. They are queued, {BATCH} at a time, and the")
    say("worker trains them in the weights that vLLM serves from. Losses are those of conversations that are")
    say("never queued, asked of the server, in nats a token; lower is better.\n")
    say("  [dim]version  learnt  facts  other  tokens   pause  Who are you?[/]")
    show(versions[0])
    for start in range(0, len(train), BATCH):
        batch = train[start : start + BATCH]
        with status(f"conversations {start + 1} to {start + len(batch)} of {len(train)}: queued, and being trained"):
            stack.producer.enqueue_many(batch)
            version = wait(stack, batch, worker)
        with status(f"asking the server what it knows at version {version}"):
            versions.append(look(stack, exam, version))
        show(versions[-1])
    say("")
    return versions


def wait(stack: DemoStack, batch: list[Transcript], worker: "subprocess.Popen[bytes]") -> int:
    """The version that has all of `batch`. Raises TandemError if worker or server ends first."""
    newest = 0
    for transcript in batch:
        while True:
            try:
                newest = max(newest, stack.producer.wait(str(transcript.id), timeout=1))
                break
            except WaitTimeoutError:
                stack.check_alive(worker)
    return newest


def look(stack: DemoStack, exam: losses.Exam, version: int) -> Seen:
    """Ask the server everything; `version` is live, and nothing is queued."""
    manifest = stack.manifest(version)
    answer, header = stack.ask(QUESTION)
    update: dict[str, Any] = {}
    if manifest.get("kind", "update") == "update" and manifest:
        update = {"tokens": int(manifest["tokens"]), "pause": float(manifest["pause_s"])}
    return Seen(version, **exam.take(version), answer=answer, header=header, digest=manifest.get("digest"), **update)


def go_back(stack: DemoStack, exam: losses.Exam, target: Seen) -> Seen:
    """`tandem rollback` to `target` in the live server; what is seen then."""
    say(f"The worker is stopped, and [bold]tandem rollback {target.version}[/] makes version {target.version} again:\n")
    with status("tandem rollback: the source model, and the batches after it once more"):
        said = stack.said_by("rollback", str(target.version))
        version = stack.producer.version()
    for line in said.splitlines():
        if "checkpoint" not in line:  # it goes with this run's folder
            say(f"  [dim]{escape(line)}[/]")
    with status(f"asking the server what it knows at version {version}"):
        back = look(stack, exam, version)
    say("")
    show_answer(QUESTION, back.answer, back.header)
    return back


def show(seen: Seen) -> None:
    """One line of the table."""
    tokens, pause = f"{seen.tokens or '':>7}", "" if seen.pause is None else f"{1000 * seen.pause:.0f} ms"
    figures = f"{seen.learnt:7.3f}{seen.facts:7.3f}{seen.other:7.3f}"
    say(f"  {seen.version:>7} {figures} {tokens} {pause:>7}  [bold]{escape(short(seen.answer, COLUMNS))}[/]")


def since(started: float) -> str:
    seconds = round(time.monotonic() - started)
    return f"{seconds} s" if seconds < 100 else f"{seconds // 60} min {seconds % 60} s"
