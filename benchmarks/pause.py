"""How long each way of applying an update would have a server stand still, what it holds, and that their bits agree.

    python benchmarks/pause.py --size 27B --tokens 400,512 --memory 14 --out results
    python benchmarks/pause.py --size tiny --tokens 64,128 --out results          # on a CPU: only that it works

No server: the trainer alone on random weights of the real shape. The pause is `Trainer.apply`, from its call until the
device has done it: what a worker does between an acknowledged pause and the resume. Ways in turn, the first round not
timed; medians. "Same bits": every product is compared with the gradient that autograd makes of the same X and dY; and a
model of a few layers of the real width is stepped from the same weights by streaming, twice, and by factors. Where a
backward pass does not repeat itself bit for bit, two streamed steps differ too, and the number of such tensors is said.
"""

import gc
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contestants import LR, make_weights
from flops import matmul_rate, wait
from memory import device_used
from record import OutOfTime, Part, Record, Until
from shapes import SIZES, text_facts, write_shape
from texts import random_examples
from transformers import AutoTokenizer

from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings, Graphs
from worker.data.batch_capacity import sizes_up_to
from worker.memory.plan import Way
from worker.model.factors import Product, Rows
from worker.shared_weights import bind
from worker.trainer.device import choose_way, growing_segments
from worker.trainer.factory import make_trainer
from worker.trainer.kernel_warmup import warm_up
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup


class Bench:
    """A model of `size` and trainers of it by way. layers: 0 for all. graphs: as --graphs."""

    def __init__(
        self, size: str, longest: int, device: torch.device, memory: float, layers: int = 0, graphs: Graphs = "off"
    ) -> None:
        self.device, self.vocabulary, self.memory = device, text_facts(size)["vocab_size"], memory
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        self.model_dir = write_shape(size, Path(self._folder.name) / "model")
        if layers:
            cut_layers(self.model_dir / "config.json", layers)
        self.tensors = make_weights(self.model_dir, device)
        self.model = bind.build_model(self.model_dir, self.tensors)
        self.tokenizer, self.h = (
            AutoTokenizer.from_pretrained(self.model_dir),
            Hyperparameters(lr=LR, max_length=longest),
        )
        settings = ApplySettings(memory=memory, graphs=graphs)
        self.chosen = choose_way(self.model, self.model_dir, self.h, settings, longest, device)

    def trainer(self, way: Way, sizes: tuple[int, ...], budget: int) -> Trainer:
        made = make_trainer(
            self.model, self.model.named_parameters(), self.tokenizer, self.h, state=None, way=way, budget=budget
        )
        if self.device.type == "cuda":
            made.sizes = sizes
        return made

    def close(self) -> None:
        self.tensors.clear()
        self._folder.cleanup()


def cut_layers(path: Path, layers: int) -> None:
    """Leave `layers` layers in a config.json."""
    import json

    config = json.loads(path.read_text())
    text = config["text_config"]
    text["num_hidden_layers"], text["layer_types"] = layers, text["layer_types"][:layers]
    path.write_text(json.dumps(config))


def timed(device: torch.device, work: Callable[[], object]) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


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


@torch.no_grad()
def _norms(trainer: Trainer) -> tuple[int, float]:
    """How many norms come from Gram matrices, and how far, relatively, one is from its product's at most."""
    squares, exact = [], []
    for parameter in trainer.parameters():
        kept = trainer.sweep.factors.of(parameter)
        gram = kept.squares() if kept is not None else None
        if kept is None or gram is None:
            continue
        out = trainer.sweep._place(parameter, 0)
        kept.write(out)
        squares.append(float(gram) ** 0.5)
        exact.append(float(torch.linalg.vector_norm(out, dtype=torch.float32)))
    return len(squares), max((abs(a / b - 1) for a, b in zip(squares, exact, strict=True) if b), default=0.0)


def same_products(bench: Bench, tokens: int, part: Part) -> None:
    """Each product against autograd's gradient of the same X and dY."""
    row = next(s for s in sizes_up_to(tokens) if s >= tokens)
    trainer = bench.trainer("factors", (row,), row)
    factors = trainer.sweep.factors
    keep, compared = factors._keep, 0
    differ: list[str] = []
    names = {id(parameter): name for name, parameter in bench.model.named_parameters()}

    def watched(weight: torch.Tensor, some: Product | Rows) -> None:
        nonlocal compared
        keep(weight, some)
        if not isinstance(some, Product):
            return
        ours = torch.empty(some.left.shape[1], some.right.shape[1], dtype=weight.dtype, device=weight.device)
        Product(some.left, some.right).write(ours)
        compared += 1
        if not torch.equal(ours, autograd_linear(weight[some.first : some.first + len(ours)], some)):
            differ.append(names[id(weight)])

    factors._keep = watched  # type: ignore[method-assign]
    try:
        trainer.begin(random_examples([tokens], bench.vocabulary, 0))
    finally:
        factors._keep = keep  # type: ignore[method-assign]
    count, worst = _norms(trainer)
    trainer.forget()
    part["products compared"], part["that differ"] = compared, differ[:8]
    part["norms from Gram matrices"], part["farthest from the product's, relative"] = count, worst
    part.check("every product has autograd's bits", compared > 0 and not differ)
    part.check("norms agree", worst < 0.01)


def autograd_linear(weight: torch.Tensor, some: Product) -> torch.Tensor:
    leaf = weight.detach().requires_grad_()
    with torch.enable_grad():
        y = functional.linear(some.right[None], leaf)
    return torch.autograd.grad(y, leaf, some.left[None])[0]


def same_steps(size: str, tokens: int, device: torch.device, memory: float, part: Part) -> None:
    """Two streamed steps and one by factors, each from the same weights and state."""
    bench = Bench(size, tokens, device, memory, layers=4)
    row = next(s for s in sizes_up_to(tokens) if s >= tokens)
    start = {name: tensor.clone() for name, tensor in bench.tensors.items()}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    ways: dict[str, Way] = {"streaming": "streaming", "again": "streaming", "factors": "factors"}
    for name, way in ways.items():
        for key, tensor in bench.tensors.items():
            tensor.copy_(start[key])
        trainer = bench.trainer(way, (row,), row)
        for seed in range(3):
            trainer.begin(random_examples([tokens], bench.vocabulary, seed))
            trainer.gradient_norm()
            trainer.apply()
        trainer.optimizer.check()
        ends[name] = {key: tensor.clone() for key, tensor in bench.tensors.items()}
        ends[name]["the optimizer's state"] = trainer.optimizer.area.memory.clone()
        del trainer
    unsteady = [key for key in ends["streaming"] if not torch.equal(ends["streaming"][key], ends["again"][key])]
    differ = [key for key in ends["streaming"] if not torch.equal(ends["streaming"][key], ends["factors"][key])]
    part["tensors"], part["streamed twice and not the same"] = len(ends["streaming"]), unsteady[:8]
    part["by factors and not the same"] = differ[:8]
    part["unsteady, differing"] = [len(unsteady), len(differ)]
    part.check("what streaming repeats, factors give too", set(differ) <= set(unsteady))
    moved = sum(not torch.equal(ends["factors"][key], start[key]) for key in start)
    part.check("the steps moved the weights", moved > len(start) / 2)
    bench.close()


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


def reclaim(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
