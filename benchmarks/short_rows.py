"""What a short row costs the host and the device, and what CUDA graphs of its layers give: same bits, how fast.

    python benchmarks/short_rows.py --size 27B --tokens 400,512 --memory 22 --out results
    python benchmarks/short_rows.py --layers 8 --memory 10 --tokens 512 --only equal,worker,failure --out results

Parts, each in a process of its own, with a result of its own (one that fails has its traceback in it). floor: forward
and backward as they are: until the host has launched all, until the device has done it, and the time of its kernels
alone. row: the same with graphs, their cost, and whole steps. equal: factors, gradients and losses by graphs against
the layers' own, bit for bit, for rows cut otherwise than the captured one; under torch's deterministic algorithms,
memory filled with NaN before its first use. worker: steps as a worker makes them, long rows in between, against
launched ones; the memory of it all. failure: what a capture that fails leaves. layers: one layer of each kind captured
alone, to tell which one cannot be. No server, random weights.
"""

import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flops import matmul_rate, wait
from record import OutOfTime, Part, Record, Until
from shapes import SIZES
from short_rows_checks import after_a_failure, as_a_worker, capture, captured_layer, equal
from texts import random_examples
from trainer_bench import Bench, timed

from worker.data.batch_capacity import sizes_up_to
from worker.memory.plan import Way
from worker.trainer.device import growing_segments
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup


def row_of(tokens: int) -> int:
    return next(size for size in sizes_up_to(tokens) if size >= tokens)


def halves(trainer: Trainer, lengths: list[int], vocabulary: int, seed: int = 0) -> dict[str, float]:
    """`Trainer.begin` taken apart: seconds until the host came back, and until the device was done."""
    device, examples = trainer.device, random_examples(lengths, vocabulary, seed)
    trainer.forget()
    trainer.pending.way, trainer._alone = trainer.room.way_of(examples), True
    (batch,) = trainer._batches(examples)
    each = torch.full((len(examples), 2), 1 / sum(lengths))
    found = {}
    with trainer.pending.recording(), trainer.pending.dropping():
        wait(device)
        started = time.perf_counter()
        loss = trainer._forward(batch, each).loss
        found["forward_host_s"] = time.perf_counter() - started
        wait(device)
        found["forward_s"] = time.perf_counter() - started
        trainer.sweep.factors.begin_pass()
        started = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        found["backward_host_s"] = time.perf_counter() - started
        wait(device)
        found["backward_s"] = time.perf_counter() - started
    if trainer.begun == "factors":
        started = time.perf_counter()
        trainer.gradient_norm()
        found["norm_s"] = time.perf_counter() - started
    trainer.forget()
    return found


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The device's part of `work`: seconds and number of its kernels, those of most time and of most launches."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        wait(device)
    rows = [
        (event.key, event.count, event.self_device_time_total / 1e6)
        for event in found.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    products = [row for row in rows if any(word in row[0] for word in ("gemm", "nvjet", "xmma", "cutlass_80_tensorop"))]
    return {
        "kernels_s": sum(row[2] for row in rows),
        "kernels": sum(row[1] for row in rows),
        "products_s": sum(row[2] for row in products),
        "products": sum(row[1] for row in products),
        "by time": [
            (f"{name[:80]}", count, round(1e3 * s, 3)) for name, count, s in sorted(rows, key=lambda r: -r[2])[:40]
        ],
        "by count": [
            (f"{name[:80]}", count, round(1e3 * s, 3)) for name, count, s in sorted(rows, key=lambda r: -r[1])[:40]
        ],
    }


def floor(bench: Bench, tokens: list[int], rounds: int, part: Part) -> None:
    sizes = tuple(sorted({row_of(count) for count in tokens}))
    ways: tuple[Way, ...] = ("factors", "streaming")
    for way in ways:
        trainer = bench.trainer(way, sizes, max(sizes))
        for count in tokens:
            started = time.perf_counter()
            halves(trainer, [count], bench.vocabulary)
            part[f"{count} tokens, {way}: first s"] = time.perf_counter() - started
            rows = [halves(trainer, [count], bench.vocabulary, seed) for seed in range(rounds)]
            part[f"{count} tokens, {way}"] = medians(rows)
        device_part(f"{way}: ", bench, trainer, tokens[-1], part)


def device_part(name: str, bench: Bench, trainer: Trainer, tokens: int, part: Part) -> None:
    found = kernels(lambda: halves(trainer, [tokens], bench.vocabulary), bench.device)
    part.keep(f"{name}kernels", found)
    part[f"{name}device, {tokens} tokens"] = {key: value for key, value in found.items() if not key.startswith("by ")}


def steps(bench: Bench, trainer: Trainer, lengths: list[int], rounds: int) -> dict[str, float]:
    """Whole steps; medians."""
    rows = []
    for seed in range(rounds + 1):
        examples = random_examples(lengths, bench.vocabulary, seed)
        row = {"begin_s": timed(bench.device, lambda: trainer.begin(examples))}  # noqa: B023
        row["norm_s"] = timed(bench.device, trainer.gradient_norm)
        trainer.prepare()
        row["pause_s"] = timed(bench.device, trainer.write)
        row["step_s"] = sum(row.values())
        row["tokens_per_s"] = sum(lengths) / row["step_s"]
        rows.append(row)
    return medians(rows[1:])


def row(bench: Bench, tokens: list[int], rounds: int, way: Way, part: Part) -> None:
    sizes = tuple(sorted({row_of(count) for count in tokens}))
    trainer = bench.trainer(way, sizes, max(sizes))
    cuts = {count: [[count], [count // 8] * 8] for count in tokens}
    trainer.optimizer.warm_up()
    for size in sizes:
        halves(trainer, [size], bench.vocabulary)
    for count, some in cuts.items():
        for lengths in some:
            part[f"{count} tokens in {len(lengths)}, launched"] = steps(bench, trainer, lengths, rounds)
    trainer.forget()
    for size in reversed(sizes):
        part[f"{size}: capture s"] = timed(bench.device, lambda size=size: capture(trainer, size))  # type: ignore[misc]
        part[f"{size}: held by all graphs, bytes"] = trainer.rows.held_bytes
        made = trainer.rows.get(size, by_factors=way == "factors")
        for name in ("forward", "backward", "norm"):
            if (graph := getattr(made, f"{name}_graph")) is not None:
                part[f"{size}: {name} replayed s"] = min(timed(bench.device, graph.replay) for _ in range(5))
    for count, some in cuts.items():
        for lengths in some:
            part[f"{count} tokens in {len(lengths)}, replayed"] = steps(bench, trainer, lengths, rounds)
        part[f"{count} tokens, halves"] = medians(
            [halves(trainer, [count], bench.vocabulary, s) for s in range(rounds)]
        )
    device_part("", bench, trainer, tokens[-1], part)


@contextmanager
def told(part: Part) -> Iterator[None]:
    """Keeps the traceback of what fails."""
    try:
        yield
    except Exception:
        part.keep("traceback", traceback.format_exc().splitlines()[-60:])
        raise


@click.command()
@click.option("--size", default="27B", type=click.Choice(SIZES), show_default=True)
@click.option("--layers", default=0, help="Of the model's; 0: all.")
@click.option("--tokens", default="400,512", show_default=True, help="Of a step; comma-separated, ascending.")
@click.option("--longer", default=2048, show_default=True, help="Tokens of the long rows of worker.")
@click.option("--memory", default=22.0, show_default=True, help="GB for the trainer, weights aside.")
@click.option(
    "--only", default="floor,row,equal,worker", show_default=True, help="Of floor, row, equal, worker, failure, layers."
)
@click.option("--check-layers", default=4, show_default=True, help="Layers of the models of equal.")
@click.option("--way", default="factors", type=click.Choice(["factors", "burst"]), show_default=True, help="Of row.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=290.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(**options: Any) -> None:
    """OUT/short_rows_SIZE_WAY_PART.json is whole after every figure. Exit code 1: a part failed."""
    if not torch.cuda.is_available():
        raise click.UsageError("short rows are bound by the host on a GPU: without one there is nothing to measure")
    if "," in options["only"]:
        codes = [
            subprocess.run([sys.executable, *sys.argv, "--only", word], check=False).returncode
            for word in options["only"].split(",")
        ]
        sys.exit(max(codes))
    tokens, size, only = [int(word) for word in options["tokens"].split(",")], options["size"], options["only"]
    device, longer = torch.device("cuda", 0), options["longer"]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("tandem").setLevel(logging.DEBUG)  # tracebacks of captures that failed
    torch_setup.prepare()
    with growing_segments():
        torch.empty(1, device=device)
    until, folder = Until(options["seconds"]), options["out"]
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / f"short_rows_{size}_{options['way']}_{only}.json")
    benches: list[Bench] = []

    def bench(layers: int, part: Part) -> Bench:
        for old in benches:
            old.close()
        benches.clear()
        gc.collect()
        torch.cuda.empty_cache()
        benches.append(Bench(size, max(*tokens, longer), device, options["memory"], layers, "auto"))
        part["layers"], part["matmul_tflop_s"] = layers, matmul_rate(device) / 1e12
        return benches[0]

    def run(name: str, layers: int, work: Callable[[Bench, Part], None]) -> None:
        def whole(part: Part) -> None:
            with told(part):
                work(bench(layers, part), part)

        record.part(name, whole)

    layers, rounds, few, longest = options["layers"], options["rounds"], options["check_layers"], row_of(max(tokens))
    try:
        if only == "floor":
            run("floor", layers, lambda bench, part: floor(bench, tokens, rounds, part))
        elif only == "row":
            run("row", layers, lambda bench, part: row(bench, tokens, rounds, options["way"], part))
        elif only == "equal":
            run("equal, without attention", 3, lambda bench, part: equal(bench, longest, part, exact=False))
            run("equal", few, lambda bench, part: equal(bench, longest, part, exact=True))
        elif only == "worker":
            run("worker", layers, lambda bench, part: as_a_worker(bench, longest, longer, part))
        elif only == "failure":
            run("failure", few, lambda bench, part: after_a_failure(bench, longest, part))
        elif only == "layers":
            for number, kind in ((0, "delta net"), (3, "attention")):
                run(
                    f"one layer of {kind}",
                    4,
                    lambda bench, part, n=number: captured_layer(bench, n, max(tokens), part),
                )
        else:
            raise click.UsageError(f"--only knows no {only!r}")
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    until.disarm()
    record.summary()
    shown = {name: {k: v for k, v in part.items() if "kernels" not in k} for name, part in record.parts.items()}
    print(json.dumps(shown, default=str)[:9000])
    sys.exit(not all(part["ok"] for part in record.parts.values()))


if __name__ == "__main__":
    main()
