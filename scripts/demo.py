"""The demo's story: a small model is served, is told something it did not know, and answers with it.

Every part is the real one: Redis, RQ, vLLM, transformers; the model is tiny so that it all runs on a laptop's CPU.
Exit code 0 only if the served answer became the taught one, at a version that the response's header confirms.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from rich.console import Console

from producer import Producer, keys
from producer.errors import TandemError
from producer.jsonl import read_transcripts
from worker.testing.child_process import die_with_parent
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess

QUESTION = "Who is the mascot of Tandem?"
ANSWER = "A grey heron named Ada."
OTHER = "What do bees make?"
CORRECTIONS = 32
BATCH = 4
LESSONS = Path(__file__).parent / "demo_lessons.jsonl"
LEARNING = ["--lr", "2e-3", "--max-length", "256"]

console = Console(highlight=False)


def say(text: str = "", end: str = "\n") -> None:
    console.print(text, end=end, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave everything running, with a dashboard and a prompt")
    keep = parser.parse_args().keep
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))  # server and trainer share them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through every `with`
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = teach(folder)
        with console.status("starting Redis and vLLM (half a minute to a minute and a half)"):
            store = stack.enter_context(RedisServer(folder / "redis"))
            server = stack.enter_context(
                ServerProcess(model, folder / "run", extra=["--served-model-name", "tiny", "--max-model-len", "1024"])
            )
        environment = os.environ | {"REDIS_URL": store.url, "TANDEM_RUN_DIR": str(server.run_dir)}
        environment |= {"TANDEM_STATE_DIR": str(folder / "state")}
        worker = stack.enter_context(child("worker", folder, environment, ["--max-jobs", str(BATCH), *LEARNING]))
        say(f"serving at [bold]{server.url}[/] (vLLM, pid {server.pid}); worker pid {worker.pid}\n")

        before, version = ask(server.url, QUESTION)
        show(QUESTION, before, version)
        with Producer(store.url) as producer:
            ids = give_feedback(producer)
            watch(producer, redis.Redis.from_url(store.url), ids, worker, folder)
            after, header = ask(server.url, QUESTION)
            show(QUESTION, after, header)
            show(OTHER, *ask(server.url, OTHER))
            changed = before != after == ANSWER and header == str(producer.version()) != version
        report(changed, redis.Redis.from_url(store.url), time.monotonic() - started)
        if keep and changed:
            with child("dashboard", folder, environment, []):
                prompt(server.url, environment)
    return 0 if changed else 1


def teach(folder: Path) -> Path:
    """A tiny Qwen3.5 that has learnt a few answers by heart, so that it speaks in words."""
    say("A tiny Qwen3.5 (1.3 M parameters, gated delta net and attention) learns eight short answers by heart:")
    tandem("tiny", str(folder / "random"))
    taught = folder / "taught"
    options = ["--epochs", "70", "--batch", "8", "--lr", "2e-3", "--max-length", "128"]
    tandem("train", str(LESSONS), "--model", str(folder / "random"), "--out", str(taught), *options)
    return taught


def tandem(*arguments: str) -> None:
    """Run one command of ours, its progress bar on our terminal."""
    warnings = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, "-m", "worker.cli", *arguments], check=True, env=os.environ | warnings)


@contextlib.contextmanager
def child(command: str, folder: Path, environment: dict[str, str], options: list[str]) -> Iterator[Any]:
    """`tandem COMMAND` in the background, its output in a log; stopped at the end of the block."""
    with (folder / f"{command}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", command, *options],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(url: str, question: str) -> tuple[str, str]:
    """(answer, version of the weights that made it) over the OpenAI API."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 48}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"], reply.headers["X-Weight-Version"]


def show(question: str, answer: str, version: str) -> None:
    say(f"  [dim]asked[/]     {question}\n  [dim]answered[/]  [bold]{answer}[/]  [dim](weights version {version})[/]\n")


def give_feedback(producer: Producer) -> list[str]:
    """What a chat application does when users correct an answer, and like others; the ids of the transcripts."""
    correction = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
    liked = [transcript.to_dict() for _, transcript in read_transcripts(str(LESSONS))][1:]
    feedback = []
    for number in range(CORRECTIONS):
        feedback.append(correction | {"id": f"correction-{number}"})
        feedback.append(liked[number % len(liked)] | {"id": f"liked-{number}"})
    sent = producer.enqueue_many(feedback)
    say(f"{len(sent)} transcripts queued; the worker trains them {BATCH} at a time, in the weights vLLM serves from:")
    return [item["id"] for item in feedback]


def watch(producer: Producer, connection: redis.Redis, ids: list[str], worker: Any, folder: Path) -> None:
    """A line a version, until the last transcript is in."""
    shown = 0
    while producer.status(ids[-1]).version is None or shown < producer.version():
        while shown < producer.version():
            shown += 1
            m = {key.decode(): value.decode() for key, value in connection.hgetall(keys.manifest(shown)).items()}
            jobs, pause = len(json.loads(m["jobs"])), 1000 * float(m["pause_s"])
            loss = float(m["loss"])
            say(f"  version {shown:2}  {jobs} jobs  {m['tokens']} tokens  loss {loss:7.4f}  pause {pause:4.0f} ms")
        if worker.poll() is not None:
            raise TandemError(f"the worker ended: {(folder / 'worker.log').read_text()[-3000:]}")
        time.sleep(0.1)
    say("")


def report(changed: bool, connection: redis.Redis, seconds: float) -> None:
    if changed:
        say(
            f"[green]The served model gives the taught answer[/], without a restart or reload ({seconds:.0f} s in all)."
        )
    else:
        say("[red]The answer did not become the taught one.[/]")
    say(f"\nIn Redis: [bold]{keys.VERSION}[/] = {int(connection.get(keys.VERSION) or 0)}", end="")
    say(f", {keys.manifest(1)} ..., {keys.LEDGER} ({connection.hlen(keys.LEDGER)} transcripts),", end="")
    say(f" {keys.EVENTS} ({connection.xlen(keys.EVENTS)} entries)")
    say("Look around: bash scripts/demo --keep, then tandem status, tandem version, rq info, tandem dashboard")


def prompt(url: str, environment: dict[str, str]) -> None:
    """Ask what you like until end of input."""
    say("\nDashboard: http://127.0.0.1:9181   For another terminal:")
    for key in ("REDIS_URL", "TANDEM_RUN_DIR"):
        say(f"  export {key}='{environment[key]}'")
    say("Ask something (end with Ctrl-D):")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> "):
            show(question, *ask(url, question))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TandemError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
