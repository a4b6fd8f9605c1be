"""What those who are served see of training: throughput, first tokens and gaps, under loads that a chat service has.

    python benchmarks/serving.py --size 27B --every 3 --transcripts 400 --out results      # a GPU
    python benchmarks/serving.py --size tiny --load 4x128 --load 4x1500 --load 4xchat1500 --seconds 15 --out results
    python benchmarks/serving.py --run-dir DIR --url URL --redis URL --model DIR ...       # a server that is there

Servers, one after the other: `keep` and `recompute` are `tandem serve --running ...`, `plain` is vLLM without Tandem.
On each, every load (serving_loads.py) runs alone and, but on `plain`, while transcripts arrive by a clock and a worker
trains them, with its defaults but for --outliers 0, since the weights are random; rounds are interleaved, and figures
are medians over them. Prefix caching is on. A gap is the time between two chunks of one stream, by the clients' clock.
First a prompt of before a version is asked again.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
import serving_report
from load import ClosedLoop
from memory import ProcessWatch, tree
from old_prefixes import PREFIX_HITS, check
from record import OutOfTime, Part, Record, Until, printable
from rig import CLOSING, Rig, Worker, metric, server_options
from serving_loads import Load
from shapes import SIZES, write_shape
from texts import text_builder
from transcript_clock import TranscriptClock

from worker.data.examples import ExampleBuilder
from worker.utils import torch_setup

KINDS = ("keep", "recompute", "plain")
ALONE, TRAINING = "alone", "training"
DEFAULT_LOADS = ("16x128", "16x3500", "4x16000", "8x128+3500+16000", "16xchat3500")
SPREAD = 0.5
"""Answers have this part of --max-tokens less to this part more."""
TURNS = count(int(time.time()))
"""Each measurement, also of another process, sends prompts of its own: those of the one before would be prefixes that
an update makes too old, and the worker would be charged for them."""
COUNTERS = {
    "preempted": "vllm:num_preemptions_total",
    "prefix_hits": PREFIX_HITS,
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "steps": "vllm:iteration_tokens_total_count",
    "queue_s": "vllm:request_queue_time_seconds_sum",
    "prefill_s": "vllm:request_prefill_time_seconds_sum",
}
"""vLLM's own, over a measurement. Hits and queries in tokens; the seconds are of all requests that ended."""
PARTS = ("linger_s", "gradients_s", "wait_for_pause_s", "pause_s", "step_s", "serving_cost_s", "jobs")
"""Of a manifest: where a version's time went. The medians are reported."""


@dataclass(frozen=True)
class Phases:
    """seconds: of each measurement; settle: before it; every: seconds between transcripts of lengths[0] to lengths[1]
    tokens; worker: options of `tandem worker`; states: which of the two are measured."""

    seconds: float
    settle: float
    rounds: int = 1
    max_tokens: int = 128
    every: float = 3.0
    lengths: tuple[int, int] = (400, 400)
    worker: Sequence[str] = field(default_factory=list)
    states: Sequence[str] = (ALONE, TRAINING)
    patience: float = 60.0


def measure(
    rig: Rig, builder: ExampleBuilder, kind: str, loads: Sequence[Load], phases: Phases, record: Record
) -> None:
    """Every load on the rig's server, which is of `kind`: a part of `record` for each."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    worker: Worker | None = None
    with ExitStack() as stack:
        if kind != "plain":
            # Random weights: their gradients wander, and a guard that knows a day's traffic would set some aside.
            worker = stack.enter_context(rig.worker("--outliers", "0", *phases.worker))
            record.about[f"worker ready, {kind}"] = worker.ready_s
            longest = min(3500, max(max(load.lengths) for load in loads))
            record.part(f"{kind}, old prefixes", lambda part: check(rig, builder, longest, phases.lengths, part))
        for _ in range(phases.rounds):
            for load in loads:

                def one(part: Part, load: Load = load) -> None:
                    states = (ALONE,) if kind == "plain" else phases.states
                    found = {state: rows.setdefault((load.name, state), []) for state in states}
                    for state in states:  # a round that is cut off takes nothing of those before it along
                        _medians(part, state, found[state])
                    for state in states:
                        found[state].append(_phase(rig, builder, load, state, phases, part, worker))
                        _medians(part, state, found[state])
                    part["rounds"] = len(found[states[0]])
                    _judge(part)

                record.part(part_name(kind, load), one)


def _medians(part: Part, state: str, rows: list[dict[str, float]]) -> None:
    """Of the rounds so far, and what each served."""
    if rows:
        part[state] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        part[f"{state}, tokens/s by rounds"] = [row["tokens_per_s"] for row in rows]


def part_name(kind: str, load: Load) -> str:
    return f"{kind}, {load.name}"


def _phase(
    rig: Rig, builder: ExampleBuilder, load: Load, state: str, phases: Phases, part: Part, worker: Worker | None
) -> dict[str, float]:
    """One measurement. Both states begin alike, clients one after another and with all texts made: how a load begins
    can decide how many prompts share a step."""
    clock = None
    if state == TRAINING:
        clock = TranscriptClock(rig, builder, phases.every, phases.lengths, phases.patience)
    with ExitStack() as stack:
        watch = stack.enter_context(ProcessWatch())
        running = stack.enter_context(
            ClosedLoop(
                rig.url,
                str(rig.model),
                load=load,
                max_tokens=phases.max_tokens,
                spread=SPREAD,
                vocabulary=900,
                turn=next(TURNS),
                ramp=phases.settle / 2,
            )
        )
        if clock is not None:
            stack.enter_context(clock)
        time.sleep(phases.settle)
        first, start = rig.producer.version(), time.monotonic()
        before = {name: metric(rig.url, counter) for name, counter in COUNTERS.items()}
        time.sleep(phases.seconds)
        served = running.between(start, time.monotonic())
        counted = {name: metric(rig.url, counter) - before[name] for name, counter in COUNTERS.items()}
        last = rig.producer.version()
        row = _memory(watch, worker)
    if running.failures:
        part[f"{state}: failures"] = [reason for _, reason in running.failures][:10]
    row |= served.plain() | counted | {"failed": float(len(running.failures))}
    if clock is None:
        return row
    trained = [rig.manifest(version) for version in range(first + 1, last + 1)]
    pauses = [manifest["pause_s"] for manifest in trained]
    row |= {"versions": float(last - first), "trained_tokens": sum(manifest["tokens"] for manifest in trained)}
    row |= {"pause_share": sum(pauses) / served.seconds, "pause_max": max(pauses, default=0.0)}
    row["charged_share"] = sum(manifest.get("serving_cost_s", 0.0) for manifest in trained) / served.seconds
    for name in PARTS:
        found = [manifest[name] for manifest in trained if name in manifest]
        row[name] = statistics.median(found) if found else float("nan")
    return row | {"latency_p50": float("nan"), "latency_max": float("nan")} | clock.plain()


def _memory(watch: ProcessWatch, worker: Worker | None) -> dict[str, float]:
    """The most that was held of a GPU, in GB: by all, by the worker, and by the largest other process, the server's
    engine. Nothing on a CPU."""
    if not watch.device:
        return {}
    own = tree(worker.pid) if worker is not None else []
    others = [held for pid, held in watch.by_pid.items() if pid not in own]
    found = {"device_gb": watch.device / 1e9, "engine_gb": max(others, default=0) / 1e9}
    return found | ({"worker_gb": watch.held(worker.pid) / 1e9} if worker is not None else {})


def _judge(part: Part) -> None:
    """What the part's medians say beside alone, and what must hold. Prompt tokens/s tell what tokens/s miss: of answers
    that begin or end outside of the seconds that are counted, only a part is counted."""
    alone, training = part.figures.get(ALONE), part.figures.get(TRAINING)
    part.check("no request failed", not any(row["failed"] for row in (alone, training) if row))
    if training is None:
        return
    part.check("something was trained", training["versions"] > 0)
    part.check("every transcript became live", training["live"] == training["sent"])
    if alone is None:
        return
    names = {
        "tokens_per_s": "tokens/s",
        "prompt_tokens_per_s": "prompt tokens/s",
        "itl_p99": "p99 gap",
        "first_token_p50": "first token",
    }
    for row in (alone, training):
        row["prompt_tokens_per_s"] = row["prompt_tokens"] / row["seconds"]
    part["times alone"] = {said: training[name] / alone[name] for name, said in names.items() if alone[name]}
    part["p99.9 above alone"] = training["itl_p999"] - alone["itl_p999"]


@contextmanager
def rig_of(size: str, model: Path | None, run_dir: Path | None, url: str, redis_url: str | None) -> Iterator[Rig]:
    """A rig without a server, or on one that is there."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        path = model or write_shape(size, Path(folder) / "model")
        rig = Rig(Path(folder), path, run_dir=run_dir, url=url, redis_url=redis_url)
        try:
            yield rig
        finally:
            rig.close()


def start(rig: Rig, kind: str, options: list[str], timeout: float, part: Part) -> None:
    """A server of `kind`; the one before it is stopped."""
    part["options"] = options
    log, started = rig.run_dir / "server.log", time.monotonic()
    before = log.stat().st_size if log.exists() else 0  # what the server before it said
    if kind == "plain":
        rig.start_server(options, timeout, plain=True)
    else:
        rig.start_server([*options, "--running", kind], timeout)
    part["start_s"] = time.monotonic() - started
    said = log.read_bytes()[before:].decode(errors="replace").splitlines()
    part["memory"] = [line for line in said if "leaves at least" in line or "KV cache" in line]


def parse_range(text: str) -> tuple[int, int]:
    """ "400" or "200:2000": tokens of a transcript."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise click.BadParameter(f"{text!r}: write 400, or 200:2000", param_hint="--transcripts")
    return found


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="tiny", show_default=True, help="Random weights of a size.")
@click.option("--model", type=click.Path(path_type=Path), help="A model directory instead of --size.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Of a server that is there; with --url and --model.")
@click.option("--url", default="", help="That server's, e.g. http://127.0.0.1:8000; --server says its kind.")
@click.option("--redis", "redis_url", help="A Redis that knows that server's weights (default: a private, empty one).")
@click.option("--server", "kinds", default="keep", show_default=True, help=f"Comma-separated: {', '.join(KINDS)}.")
@click.option("--load", "loads", multiple=True, default=DEFAULT_LOADS, show_default=True, help="See serving_loads.py.")
@click.option("--seconds", default=40.0, show_default=True, help="Of each measurement.")
@click.option("--settle", type=float, help="Seconds before it [default: a fifth of it, at least 2].")
@click.option("--rounds", default=1, show_default=True)
@click.option("--states", default=f"{ALONE},{TRAINING}", show_default=True, help="Which of the two are measured.")
@click.option("--every", default=3.0, show_default=True, help="Seconds between two transcripts.")
@click.option("--patience", default=60.0, show_default=True, help="Seconds that transcripts may be late at an end.")
@click.option("--transcripts", default="400", show_default=True, help="Their tokens, or a range: 200:2000.")
@click.option("--max-tokens", default=128, show_default=True, help="Of an answer, on average.")
@click.option("--prefix-max-age", type=int, help="tandem serve's, for keep.")
@click.option("--trainer-memory", type=float, help="GB that vLLM leaves [default: its plan's].")
@click.option("--until", "limit", default=580.0, show_default=True, help="Seconds for all of it.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
@click.option("--worker-option", multiple=True, help="More of `tandem worker`'s, one word each.")
def main(**o: Any) -> None:
    """Measure servers with and without a worker beside them."""
    kinds = o["kinds"].split(",")
    if unknown := set(kinds) - set(KINDS):
        raise click.UsageError(f"--server: unknown {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    if o["run_dir"] and not (o["url"] and o["model"] and len(kinds) == 1):
        raise click.UsageError("--run-dir needs --url, --model and one kind in --server: what that server is")
    try:
        loads = [Load.parse(name) for name in o["loads"]]
    except ValueError as error:
        raise click.UsageError(f"--load: {error}") from None
    seconds = o["seconds"]
    settle = max(2.0, seconds / 5) if o["settle"] is None else o["settle"]
    lengths = parse_range(o["transcripts"])
    states = o["states"].split(",")
    if set(states) - {ALONE, TRAINING}:
        raise click.UsageError(f"--states {o['states']}: write {ALONE}, {TRAINING} or {ALONE},{TRAINING}")
    phases = Phases(
        seconds, settle, o["rounds"], o["max_tokens"], o["every"], lengths, o["worker_option"], states, o["patience"]
    )
    outputs.folder(o["out"])
    until = Until(max(1.0, o["limit"] - CLOSING))
    torch_setup.prepare()
    record = Record(o["out"] / "serving.json")
    record.about |= {"gpu": torch.cuda.is_available(), "options": {key: printable(str(o[key])) for key in o}}
    length = max(load.longest(round((1 + SPREAD) * o["max_tokens"])) for load in loads) + 64
    clients = max(load.clients for load in loads)
    options = server_options(length, None, ("--enable-prefix-caching", *o["server_option"]), clients)
    try:
        with rig_of(o["size"], o["model"], o["run_dir"], o["url"], o["redis_url"]) as rig:
            builder = text_builder(rig.model)
            for kind in kinds:
                own = list(options)
                if o["trainer_memory"] and kind != "plain":
                    own += ["--trainer-memory", str(o["trainer_memory"])]
                if o["prefix_max_age"] and kind == "keep":
                    own += ["--prefix-max-age", str(o["prefix_max_age"])]
                begin = lambda part, kind=kind, own=own: start(rig, kind, own, until.left, part)  # noqa: E731
                if o["run_dir"] or record.part(f"server, {kind}", begin):
                    measure(rig, builder, kind, loads, phases, record)
                    serving_report.plot(record.parts, o["out"] / "serving.png")
            until.disarm()
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    finally:
        until.disarm()
    serving_report.show(record.parts)
    serving_report.plot(record.parts, o["out"] / "serving.png")
    record.summary()
    sys.exit(0 if record.parts and all(part.get("ok") for part in record.parts.values()) else 1)


if __name__ == "__main__":
    main()
