"""The small story, in two minutes on any machine: a tiny Qwen3.5 is corrected by feedback, and answers differently.

Exit code 0 only if the served answer became the taught one, at a version that the response's header confirms.
"""

import json
import subprocess
import time
from pathlib import Path

from demo_parts.screen import say, show_answer
from demo_parts.stack import DemoStack, tandem
from producer import Producer, keys
from producer.jsonl import read_transcripts

QUESTION = "Who is the mascot of Tandem?"
ANSWER = "A grey heron named Ada."
OTHER = "What do bees make?"
CORRECTIONS = 32
BATCH = 4
LESSONS = Path(__file__).parents[1] / "demo_data" / "tiny_lessons.jsonl"
LEARNING = ["--lr", "2e-3", "--max-length", "256"]
WAITING = "starting Redis and vLLM (half a minute to a minute and a half)"


def tell(folder: Path, keep: bool) -> int:
    """Run the story in `folder`; the exit code. keep: leave all running at its end, with a prompt."""
    started = time.monotonic()
    model = teach(folder)
    with (
        DemoStack(folder, model, ["--max-model-len", "1024"], WAITING) as stack,
        stack.child("worker", "--max-jobs", str(BATCH), *stack.metrics, *LEARNING) as worker,
    ):
        url, pid = stack.server.url, stack.server.pid
        say(f"serving at [bold]{url}[/] (vLLM, pid {pid}); worker pid {worker.pid}\n")
        before, version = stack.ask(QUESTION)
        show_answer(QUESTION, before, version)
        watch(stack, give_feedback(stack.producer), worker)
        after, header = stack.ask(QUESTION)
        show_answer(QUESTION, after, header)
        show_answer(OTHER, *stack.ask(OTHER))
        changed = before != after == ANSWER and header == str(stack.producer.version()) != version
        report(stack, changed, time.monotonic() - started)
        if keep and changed:
            stack.prompt()
    return 0 if changed else 1


def teach(folder: Path) -> Path:
    """A tiny Qwen3.5 that has learnt a few answers by heart, so that it speaks in words."""
    say("A tiny Qwen3.5 (1.3 M parameters, gated delta net and attention) learns eight short answers by heart:")
    tandem("tiny", str(folder / "random"))
    taught = folder / "taught"
    options = ["--epochs", "70", "--batch", "8", "--lr", "2e-3", "--max-length", "128"]
    tandem("train", str(LESSONS), "--model", str(folder / "random"), "--out", str(taught), *options)
    return taught


def give_feedback(producer: Producer) -> list[str]:
    """What a chat application does when users correct an answer, and like others; the ids of the transcripts."""
    lesson = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    liked = [transcript.to_dict() for _, transcript in read_transcripts(str(LESSONS))][1:]
    feedback = []
    for number in range(CORRECTIONS):
        feedback.append(lesson | {"id": f"lesson-{number}"})
        feedback.append(liked[number % len(liked)] | {"id": f"liked-{number}"})
    sent = producer.enqueue_many(feedback)
    say(f"{len(sent)} transcripts queued; the worker trains them {BATCH} at a time, in the weights vLLM serves from:")
    return [item["id"] for item in feedback]


def watch(stack: DemoStack, ids: list[str], worker: "subprocess.Popen[bytes]") -> None:
    """A line a version, until the last transcript is in."""
    producer, shown = stack.producer, 0
    while producer.status(ids[-1]).version is None or shown < producer.version():
        while shown < producer.version():
            shown += 1
            manifest = stack.manifest(shown)
            jobs, pause = len(json.loads(manifest["jobs"])), 1000 * float(manifest["pause_s"])
            loss, tokens = float(manifest["loss"]), manifest["tokens"]
            say(f"  version {shown:2}  {jobs} jobs  {tokens} tokens  loss {loss:7.4f}  pause {pause:4.0f} ms")
        stack.check_alive(worker)
        time.sleep(0.1)
    say("")


def report(stack: DemoStack, changed: bool, seconds: float) -> None:
    if changed:
        say(
            f"[green]The served model gives the taught answer[/], without a restart or reload ({seconds:.0f} s in all)."
        )
    else:
        say("[red]The answer did not become the taught one.[/]")
    say(f"\nIn Redis: [bold]{keys.VERSION}[/] = {stack.producer.version()}", end="")
    say(f", {keys.manifest(1)} ..., {keys.LEDGER} ({stack.redis.hlen(keys.LEDGER)} transcripts),", end="")
    say(f" {keys.EVENTS} ({stack.redis.xlen(keys.EVENTS)} entries)")
    say("Look around: bash scripts/demo --tiny --keep, then tandem status, tandem version, rq info, tandem dashboard")
