"""How long each way of applying an update would have a server stand still, what it holds, and that their bits agree.

    python benchmarks/pause.py --size 27B --tokens 400,512 --memory 14 --out results
    python benchmarks/pause.py --size tiny --tokens 64,128 --out results          # on a CPU: only that it works

No server: the trainer alone on random weights of the real shape. The pause is `Trainer.apply`, from its call until the
device has done it: what a worker does between an acknowledged pause and the resume. Ways in turn, the first round not
timed; medians. "Same bits": every product is compared with the gradient that autograd makes of the same X and dY; and a
model of a few layers of the real width is stepped from the same weights by streaming, twice, and by factors. Where a
backward pass does not repeat itself bit for bit, two streamed steps differ too, and the number of such tensors is said.
"""

import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flops import matmul_rate, wait
from memory import device_used
from pause_checks import same_products, same_steps
from record import OutOfTime, Part, Record, Until
from shapes import SIZES
from texts import random_examples
from trainer_bench import Bench, reclaim, timed

from worker.data.batch_capacity import sizes_up_to
from worker.memory.plan import Way
from worker.trainer.device import growing_segments
from worker.trainer.kernel_warmup import warm_up
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup


def step(trainer: Trainer, tokens: int, vocabulary: int, seed: int) -> dict[str, float]:
    """One step of `tokens` tokens; seconds of its parts, and bytes."""
    device, cuda = trainer.device, trainer.device.type == "cuda"
    examples = random_examples([tokens], vocabulary, seed)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    found = {"begin_s": timed(device, lambda: trainer.begin(examples))}
    found["norm_s"] = timed(device, trainer.gradient_norm)
    trainer.prepare()
    if trainer.begun == "factors":
        found["products_s"] = timed(device, lambda: list(trainer.sweep.products()))
    wait(device)
    reserved = torch.cuda.memory_reserved(device) if cuda else 0
    started = time.perf_counter()
    trainer.write()
    found["launched_s"] = time.perf_counter() - started
    trainer.optimizer.check()
    wait(device)
    found["pause_s"] = time.perf_counter() - started
    trainer.measured()
    if cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        found["taken_in_the_pause_bytes"] = torch.cuda.memory_reserved(device) - reserved
    return found


def pauses(bench: Bench, tokens: list[int], rounds: int, part: Part) -> None:
    sizes = tuple(sorted({next(s for s in sizes_up_to(max(tokens)) if s >= count) for count in tokens}))
    ways: tuple[Way, ...] = ("streaming", "factors")
    trainers = {way: bench.trainer(way, sizes, max(sizes)) for way in ways}
    for way, trainer in trainers.items():
        part[f"{way}: warm-up s"] = warm_up(trainer).seconds
    base = device_used() - sum(tensor.nbytes for tensor in bench.tensors.values())
    part["used beside the weights after the warm-up"] = base
    for count in tokens:
        steps: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for round_ in range(rounds + 1):
            for way, trainer in trainers.items():
                found = step(trainer, count, bench.vocabulary, round_)
                if round_:
                    steps[way].append(found)
        for way, all in steps.items():
            row = {key: statistics.median(one[key] for one in all) for key in all[0]}
            row["worst_pause_s"] = max(one["pause_s"] for one in all)
            part[f"{count} tokens, {way}"] = row
            if way == "factors" and "taken_in_the_pause_bytes" in row:
                most = max(one["taken_in_the_pause_bytes"] for one in all)
                part.check(f"{count} tokens: nothing is taken from the device in the pause", most == 0)
    used = device_used() - sum(tensor.nbytes for tensor in bench.tensors.values())
    part["used beside the weights"] = used


def profile(bench: Bench, tokens: int, path: Path) -> None:
    """The kernels of one `apply` by factors, those that take longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    row = next(s for s in sizes_up_to(tokens) if s >= tokens)
    trainer = bench.trainer("factors", (row,), row)
    for seed in range(2):
        trainer.begin(random_examples([tokens], bench.vocabulary, seed))
        trainer.gradient_norm()
        wait(bench.device)
        if seed == 0:
            trainer.apply()
    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        trainer.apply()
        wait(bench.device)
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90)
    path.write_text(table + "\n")


@click.command()
@click.option("--size", default="27B", type=click.Choice(SIZES), show_default=True)
@click.option("--tokens", default="400,512", show_default=True, help="Of a step's one sequence; comma-separated.")
@click.option("--memory", default=14.0, show_default=True, help="GB for the trainer, weights aside.")
@click.option("--steps/--no-steps", default=True, show_default=True, help="Also compare whole steps.")
@click.option("--longer", default="", help="More tokens to try, each by itself, whatever --memory says.")
@click.option("--profile", is_flag=True, help="Also OUT/pause_profile.txt: kernels of writes by factors.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=560.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(**options: Any) -> None:
    """Measure the pauses; OUT/pause.json is whole after every figure."""
    tokens, size = [int(word) for word in options["tokens"].split(",")], options["size"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and size != "tiny":
        raise click.UsageError("without an NVIDIA GPU only --size tiny can be tried")
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the memory plan
    torch_setup.prepare()
    with growing_segments():
        torch.empty(1, device=device)
    until = Until(options["seconds"])
    options["out"].mkdir(parents=True, exist_ok=True)
    record = Record(options["out"] / "pause.json")
    benches: list[Bench] = []

    def set_up(part: Part) -> None:
        benches.append(Bench(size, max(tokens), device, options["memory"]))
        part["by factors up to"], part["matmul_tflop_s"] = benches[0].chosen.by_factors, matmul_rate(device) / 1e12

    try:
        if options["steps"]:
            record.part("same steps", lambda part: same_steps(size, max(tokens), device, options["memory"], part))
        reclaim(device)
        if record.part(f"{size}, set up", set_up):
            record.part("pauses", lambda part: pauses(benches[0], tokens, options["rounds"], part))
            record.part("same products", lambda part: same_products(benches[0], max(tokens), part))
            if options["profile"]:
                path = options["out"] / "pause_profile.txt"
                record.part("profile", lambda part: profile(benches[0], max(tokens), path))
            for word in filter(None, options["longer"].split(",")):
                reclaim(device)
                record.part(f"pauses, {word} tokens", lambda part, word=word: pauses(benches[0], [int(word)], 3, part))
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    until.disarm()
    for bench in benches:
        bench.close()
    record.summary()


if __name__ == "__main__":
    main()
