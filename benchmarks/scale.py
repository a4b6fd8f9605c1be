"""A plan of more GPUs than were measured: seconds and bytes of a version by replicas, and what bounds it first.

    python benchmarks/scale.py MODEL --out results     MODEL: a directory with a tokenizer

Computed, not run. What it computes from: a step of one GPU (results/training_27B.json, an H200), the all-reduce of two
(measured, below), a worker's time for a job in Redis (queue.json), and what this script measures here, on a CPU: what
rank 0 does for every transcript (tokenize, journal). Links between hosts are assumed, and said. scale.json, scale.png:
below it also draws how long other systems take to bring new weights to their servers, by their own figures.

Invariant: nothing measured and nothing assumed is mixed without being named.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import outputs
from matplotlib.figure import Figure
from record import about
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.checkpoint.batch_codec import make_ready, pack_batch
from worker.checkpoint.journal import Journal
from worker.checkpoint.record_file import pack
from worker.checkpoint.records import UpdateRecord
from worker.config.hyperparameters import Hyperparameters
from worker.trainer.factory import make_builder
from worker.utils import torch_setup

HERE = Path(__file__).parent
NVLINK = 329e9
"""Bytes a second: bus bandwidth of an all-reduce by NCCL on 2 H100 of one host, measured."""
NIC_400, NIC_100 = 50e9, 12.5e9
"""Bytes a second of one 400 or 100 Gb/s link a GPU, fully used: assumed."""
TOKENS, TRANSCRIPT = 8192, 400
"""Of a rank in a version, and of one transcript."""


@dataclass(frozen=True)
class Layout:
    """hosts of gpus each; link: the slowest way between two of them, in bytes a second."""

    name: str
    replicas: int
    hosts: int
    link: float


LAYOUTS = (
    Layout("1 GPU", 1, 1, NVLINK),
    Layout("2, one host", 2, 1, NVLINK),
    Layout("8, one host", 8, 1, NVLINK),
    Layout("16, two hosts, 400 Gb/s a GPU", 16, 2, NIC_400 * 8),
    Layout("64, eight hosts, 400 Gb/s a GPU", 64, 8, NIC_400 * 8),
    Layout("64 hosts of one GPU, 400 Gb/s", 64, 64, NIC_400),
    Layout("64 hosts of one GPU, 100 Gb/s", 64, 64, NIC_100),
)


@dataclass(frozen=True)
class Peer:
    """Seconds until servers have new weights, as its authors give them."""

    name: str
    parameters: float
    seconds: float
    where: str
    source: str


BROADCAST = "checkpoint-engine's README: gather and broadcast"
PEERS = (
    Peer("checkpoint-engine, GLM-4.5-Air", 106e9, 3.59, "8 H800", BROADCAST),
    Peer("checkpoint-engine, Qwen3-235B", 235e9, 6.55, "8 H800", BROADCAST),
    Peer("checkpoint-engine, Kimi-K2 (FP8)", 1e12, 17.26, "256 H20", BROADCAST),
    Peer("slime, Qwen3-30B-A3B", 30.5e9, 7.0, "one machine, colocated", "slime's authors: from 60 s to 7 s"),
    Peer("SGLang, NCCL broadcast, Kimi-K2", 1e12, 53.0, "512 H100", "SGLang's authors"),
    Peer("SGLang, RDMA, Kimi-K2", 1e12, 7.2, "512 H100", "SGLang's authors"),
)
OURS = (
    Peer("Tandem, 27B, burst", 26.9e9, 0.060, "1 H200", "RESULTS.md: the pause, idle"),
    Peer("Tandem, 27B, factors, 400 tokens", 26.9e9, 0.118, "1 H100", "RESULTS.md: the pause"),
    Peer("Tandem, 27B, streaming, 8,192 tokens", 26.9e9, 2.2, "1 H200", "RESULTS.md: the pause, backward included"),
)


@dataclass(frozen=True)
class Costs:
    """step_s: of one GPU, TOKENS tokens. weights: bytes of bf16 weights, and so of gradients. The others: of one
    transcript of TRANSCRIPT tokens, in seconds of one core, and its bytes in the journal."""

    step_s: float
    weights: float
    tokenize_s: float
    queue_s: float
    journal_s: float
    journal_bytes: float
    fsync_s: float


def measured_here(model: Path) -> dict[str, float]:
    """What rank 0 does for a transcript of about TRANSCRIPT tokens, medians on this machine."""
    torch_setup.prepare()
    h = Hyperparameters()
    builder = make_builder(AutoTokenizer.from_pretrained(model), model, h)
    words = ("the harbour of the small town was widened because ships had become too large " * 60).split()

    def transcript(length: int) -> Transcript:
        half = " ".join(words[:length])
        return Transcript.from_dict(
            {"messages": [{"role": "user", "content": half}, {"role": "assistant", "content": half}]}
        )

    length = next(n for n in range(20, len(words)) if builder.build(transcript(n), "t").tokens >= TRANSCRIPT)
    one = transcript(length)
    ready = make_ready(one, builder.build(one, "t"))
    batch = [ready] * 100
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), "scale")
        record = UpdateRecord(1, "0" * 32, 0, 0, [f"t{n}" for n in range(100)], pack_batch(batch), {})
        size = len(pack(record.plain())) / 100
        packing = seconds(lambda: pack(UpdateRecord(1, "0" * 32, 0, 0, [], pack_batch(batch), {}).plain())) / 100
        versions = iter(range(1, 1000))

        def write() -> None:
            version = next(versions)
            journal.append(UpdateRecord(version, "0" * 32, version - 1, version - 1, [], [], {}))

        fsync = seconds(write, time.perf_counter)
        journal.close()
    return {
        "tokenize_s": seconds(lambda: make_ready(one, builder.build(one, "t"))),
        "journal_s": packing,
        "journal_bytes": size,
        "fsync_s": fsync,
    }


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """The median of 30 calls, after one that does not count; of this process's time on a core, unless by another
    clock."""
    work()
    took = []
    for _ in range(30):
        started = clock()
        work()
        took.append(clock() - started)
    return statistics.median(took)


def all_reduce(layout: Layout, size: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: each link carries 2 (n - 1) / n of them."""
    n = layout.replicas
    return 2 * (n - 1) / n * size / layout.link if n > 1 else 0.0


def plan(layout: Layout, costs: Costs) -> dict[str, Any]:
    """One version of TOKENS tokens a rank: each part's seconds, one after the other as the worker does them, and the
    tokens a second that follow."""
    transcripts = layout.replicas * TOKENS / TRANSCRIPT
    reduce_s = all_reduce(layout, costs.weights)
    host_s = transcripts * (costs.tokenize_s + costs.queue_s)
    journal_s = transcripts * costs.journal_s + costs.fsync_s
    parts = {"all-reduce": reduce_s, "rank 0: tokenize and queue": host_s, "rank 0: journal": journal_s}
    version_s = costs.step_s + sum(parts.values())
    return {
        "layout": asdict(layout),
        "transcripts a version": transcripts,
        "version_s": version_s,
        "parts_s": {"one GPU's step": costs.step_s, **parts},
        "tokens_per_s": layout.replicas * TOKENS / version_s,
        "jobs_per_s": transcripts / version_s,
        "journal_bytes": transcripts * costs.journal_bytes,
        "bytes a link": all_reduce(layout, costs.weights) * layout.link,
        "join_s": costs.weights / layout.link if layout.replicas > 1 else 0.0,
        "most besides the step": max(parts, key=lambda name: parts[name]),
    }


def first_bound(costs: Costs) -> dict[str, float]:
    """At how many replicas what rank 0 does alone takes as long as the step: more do not help."""
    each = TOKENS / TRANSCRIPT * (costs.tokenize_s + costs.queue_s)
    return {"replicas": costs.step_s / each, "jobs_per_s": TOKENS / TRANSCRIPT * (costs.step_s / each) / costs.step_s}


def draw(plans: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 8), layout="constrained")
    above, below = figure.subplots(2, 1)
    names = [plan["layout"]["name"] for plan in plans]
    left = [0.0] * len(plans)
    for part in plans[0]["parts_s"]:
        widths = [plan["parts_s"][part] for plan in plans]
        above.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, plan in enumerate(plans):
        above.text(left[index], index, f"  {plan['times one GPU']:.1f} x", va="center")
    above.invert_yaxis()
    above.set(xlabel=f"seconds of a version, {TOKENS:,} tokens a replica, 27B (computed)", xlim=(0, max(left) * 1.15))
    above.legend()
    for peers, mark in ((PEERS, "o"), (OURS, "s")):
        for peer in peers:
            below.plot(peer.parameters, peer.seconds, mark, color="C3" if peers is OURS else "C0")
            beside = (6, -9 if "RDMA" in peer.name else 3)
            label = f"{peer.name} ({peer.where})"
            below.annotate(label, (peer.parameters, peer.seconds), beside, textcoords="offset points", fontsize=8)
    below.set(xscale="log", yscale="log", xlabel="parameters", xlim=(2e10, 1.2e13),
              ylabel="seconds until servers have the new weights")  # fmt: skip
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    out = outputs.folder(arguments.out)
    training = json.loads((HERE / "results" / "training_27B.json").read_text())["parts"]
    queue = json.loads((HERE / "queue.json").read_text())["results"]["Tandem, batch 32"]
    costs = Costs(
        step_s=training["27B, 8 x 1024"]["ours, streaming"]["step_s"],
        weights=training["27B, set up"]["weights_bytes"],
        queue_s=queue["worker_cpu_ms_per_job"] / 1e3,
        **measured_here(arguments.model),
    )
    plans = [plan(layout, costs) for layout in LAYOUTS]
    for one in plans:
        one["times one GPU"] = one["tokens_per_s"] / plans[0]["tokens_per_s"]
    table = Table(title=f"27B, {TOKENS:,} tokens a replica and version: computed")
    for column in ("layout", "version", "all-reduce", "rank 0", "journal", "x one GPU", "jobs/s", "joins in"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for one in plans:
        parts = one["parts_s"]
        table.add_row(
            one["layout"]["name"],
            f"{one['version_s']:.2f} s",
            f"{parts['all-reduce']:.2f} s",
            f"{parts['rank 0: tokenize and queue']:.2f} s",
            f"{one['journal_bytes'] / 1e6:.2f} MB",
            f"{one['times one GPU']:.2f}",
            f"{one['jobs_per_s']:.0f}",
            f"{one['join_s']:.2f} s",
        )
    Console(width=120).print(table)
    bound = first_bound(costs)
    print(
        f"rank 0 alone takes as long as a step from {bound['replicas']:.0f} replicas ({bound['jobs_per_s']:.0f} jobs/s)"
    )
    found = {
        "about": about(),
        "costs": asdict(costs),
        "plans": plans,
        "first_bound": bound,
        "weights to servers": [asdict(peer) for peer in (*PEERS, *OURS)],
    }
    (out / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(plans, out / "scale.png")


if __name__ == "__main__":
    main()
