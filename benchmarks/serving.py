"""What training costs those who are served: vLLM's throughput and inter-token latency under a closed loop of requests.

    python benchmarks/serving.py --size 0.8B --clients 16 --seconds 30 --out results
    python benchmarks/serving.py --run-dir DIR --url URL --redis URL --model DIR ...   # a server that is there

Phases, interleaved over the rounds: alone; beside a worker that has nothing to do; beside one that trains as fast as it
can, its queue never empty; and the same at a duty cycle. Latency is the gap between two chunks of one stream, by the
clients' clock; a chunk is a token unless several were ready at once. Medians over the rounds.
"""

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from load import ClosedLoop
from record import OutOfTime, Part, Record, Until
from rich.console import Console
from rich.table import Table
from rig import Rig
from rq import Queue
from shapes import SIZES, write_shape
from texts import conversation, text_builder

from producer import keys
from worker.data.examples import ExampleBuilder
from worker.utils import torch_setup

QUEUE = Queue.redis_queue_namespace_prefix + keys.QUEUE
ALONE, IDLE, FULL, DUTY = "alone", "idle worker", "training at full", "training at duty cycle"


@dataclass(frozen=True)
class Phases:
    """seconds: of each measurement; settle: before it; duty: the share of time that the last phase may train."""

    seconds: float
    settle: float
    clients: int
    duty: float
    rounds: int = 1
    prompt_tokens: int = 128
    max_tokens: int = 128
    apply: str = "streaming"


class Feeder:
    """Keeps two versions' worth of transcripts queued, from `with` on."""

    _names = count()

    def __init__(self, rig: Rig, builder: ExampleBuilder, jobs: int, tokens: int) -> None:
        self._rig, self._jobs = rig, jobs
        name = f"feed-{os.getpid()}-{next(self._names)}"
        self._texts = [conversation(builder, f"{name}-{number}", tokens) for number in range(jobs)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    def __enter__(self) -> "Feeder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._rig.redis.delete(QUEUE)  # what is left would be the next phase's

    def _feed(self) -> None:
        sent = 0
        while not self._over.is_set():
            if self._rig.redis.llen(QUEUE) < 2 * self._jobs:
                again = [text | {"id": f"{text['id']}-{sent}"} for text in self._texts]
                self._rig.producer.enqueue_many(again)
                sent += 1
            else:
                time.sleep(0.02)


def measure(rig: Rig, builder: ExampleBuilder, phases: Phases, sizes: Any, part: Part) -> None:
    """All phases into `part`; `sizes` as in stack_checks."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (ALONE, IDLE, FULL, DUTY)}

    def phase(name: str) -> None:
        rows[name].append(_phase(rig, builder, phases, sizes, name, part))
        part[name] = {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}

    options = sizes.options(phases.apply)
    for _ in range(phases.rounds):
        phase(ALONE)
        with rig.worker(*options):
            phase(IDLE)
            phase(FULL)
        with rig.worker(*options, "--duty-cycle", str(phases.duty)):
            phase(DUTY)
    part["rounds"] = phases.rounds
    for name in rows:
        part.check(f"{name}: no request failed", not any(row["failed"] for row in rows[name]))
    for name in (FULL, DUTY):
        part.check(f"{name}: something was trained", part.figures[name]["versions"] > 0)


def _phase(rig: Rig, builder: ExampleBuilder, phases: Phases, sizes: Any, name: str, part: Part) -> dict[str, float]:
    with ExitStack() as stack:
        if name in (FULL, DUTY):
            stack.enter_context(Feeder(rig, builder, sizes.jobs, sizes.version_tokens // sizes.jobs))
            _until_version(rig, rig.producer.version() + 1)
        load = stack.enter_context(
            ClosedLoop(
                rig.url,
                str(rig.model),
                clients=phases.clients,
                prompt_tokens=phases.prompt_tokens,
                max_tokens=phases.max_tokens,
            )
        )
        time.sleep(phases.settle)
        if name in (FULL, DUTY):  # from one version to another, so that rest and training are in proportion
            first = _until_version(rig, rig.producer.version() + 1)
            start = time.monotonic()
            time.sleep(phases.seconds)
            last = _until_version(rig, rig.producer.version() + 1)
        else:
            first, start = rig.producer.version(), time.monotonic()
            time.sleep(phases.seconds)
            last = rig.producer.version()
        served = load.between(start, time.monotonic())
    if load.failures:
        part[f"{name}: failures"] = [reason for _, reason in load.failures][:10]
    trained = [rig.manifest(version) for version in range(first + 1, last + 1)]
    tokens = sum(manifest.get("tokens", 0.0) for manifest in trained)
    pauses = [manifest["pause_s"] for manifest in trained if "pause_s" in manifest]
    row = served.plain() | {"failed": float(len(load.failures))}
    row |= {"versions": float(last - first), "trained_tokens_per_s": tokens / served.seconds}
    return row | {"pause_share": sum(pauses) / served.seconds}


def _until_version(rig: Rig, version: int, timeout: float = 240.0) -> int:
    """Wait for `version`; the one that is live then."""
    deadline = time.monotonic() + timeout
    while (found := rig.producer.version()) < version:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no version {version} within {timeout:g} s: {rig.workers[-1].said()[-2000:]}")
        time.sleep(0.01)
    return found


def show(part: dict[str, Any]) -> None:
    """The table of a part that `measure` filled."""
    table = Table(title="Serving beside training, medians over the rounds")
    for column in ("", "tokens/s", "x alone", "ITL p50 ms", "p99", "most", "first token p50 ms", "trained tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name in (ALONE, IDLE, FULL, DUTY):
        if row := part.get(name):
            times = [1000 * row[key] for key in ("itl_p50", "itl_p99", "itl_max", "first_token_p50")]
            share = row["tokens_per_s"] / part[ALONE]["tokens_per_s"]
            cells = [f"{row['tokens_per_s']:,.0f}", f"{share:.2f}", *(f"{ms:,.1f}" for ms in times)]
            table.add_row(name, *cells, f"{row['trained_tokens_per_s']:,.0f}")
    Console(width=120).print(table)


@contextmanager
def rig_of(
    size: str,
    model: Path | None,
    run_dir: Path | None,
    url: str,
    redis_url: str | None,
    options: list[str],
    wait: float,
) -> Iterator[Rig]:
    """A rig with a server of its own, or on one that is there."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        rig = Rig(
            Path(folder),
            model or write_shape(size, Path(folder) / "model"),
            run_dir=run_dir,
            url=url,
            redis_url=redis_url,
        )
        try:
            if run_dir is None:
                rig.start_server(options, wait)
            yield rig
        finally:
            rig.close()


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="tiny", show_default=True, help="Random weights of a size.")
@click.option("--model", type=click.Path(path_type=Path), help="A model directory instead of --size.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Of a server that is there; with --url and --model.")
@click.option("--url", default="", help="That server's, e.g. http://127.0.0.1:8000.")
@click.option("--redis", "redis_url", help="A Redis that knows that server's weights (default: a private, empty one).")
@click.option("--clients", default=8, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--duty-cycle", default=0.3, show_default=True)
@click.option("--apply", default="streaming", show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--version-tokens", default=8192, show_default=True)
@click.option("--jobs", default=8, show_default=True)
@click.option("--trainer-memory", type=float, help="GB that vLLM leaves [default: its plan's].")
@click.option("--until", "limit", default=580.0, show_default=True, help="Seconds for all of it.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
@click.option("--worker-option", multiple=True, help="More of `tandem worker`'s, one word each.")
def main(**o: Any) -> None:
    """Measure a server with and without a worker beside it."""
    from stack_27b import CLOSING, server_options
    from stack_checks import Sizes

    if o["run_dir"] and not (o["url"] and o["model"]):
        raise click.UsageError("--run-dir needs --url and --model: the server's address and its model directory")
    until = Until(max(1.0, o["limit"] - CLOSING))
    torch_setup.prepare()
    o["out"].mkdir(parents=True, exist_ok=True)
    record = Record(o["out"] / "serving.json")
    record.about |= {"gpu": torch.cuda.is_available(), "options": {key: str(value) for key, value in o.items()}}
    tokens = o["version_tokens"]
    sizes = Sizes(
        version_tokens=tokens,
        jobs=o["jobs"],
        single_tokens=tokens // o["jobs"],
        versions=0,
        singles=0,
        clients=o["clients"],
        lr=3e-5,
        worker=list(o["worker_option"]),
    )
    phases = Phases(
        o["seconds"], max(2.0, o["seconds"] / 5), o["clients"], o["duty_cycle"],
        o["rounds"], o["prompt_tokens"], o["max_tokens"], o["apply"],
    )  # fmt: skip
    options = server_options(o["prompt_tokens"] + o["max_tokens"] + 64, o["trainer_memory"], o["server_option"])
    try:
        with rig_of(o["size"], o["model"], o["run_dir"], o["url"], o["redis_url"], options, until.left) as rig:
            builder = text_builder(rig.model)
            record.part("serving", lambda part: measure(rig, builder, phases, sizes, part))
            until.disarm()
    except OutOfTime:
        until.disarm()
        print("the time is over: what is missing was not run", flush=True)
    show(record.parts.get("serving", {}))
    record.summary()
    sys.exit(0 if record.parts.get("serving", {}).get("ok") else 1)


if __name__ == "__main__":
    main()
