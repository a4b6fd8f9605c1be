"""Training alone on one GPU: tokens/s, MFU, memory, by model size and token budget, ours and the peers interleaved.

    python benchmarks/training.py --sizes 0.8B,27B --out results --seconds 560
    python benchmarks/training.py --sizes tiny --budgets 512,256 --out results      # on a CPU: only that it works

Random weights, random token ids, every token but a sequence's first trained. Each configuration (size, budget, how many
sequences) has one untimed round and `--rounds` timed ones, all contestants in turn; medians. Memory is the most that a
step had allocated beyond what lay there before it: weights and optimizers' states. MFU counts forward and backward
(flops.py), against bf16 products measured in the same run; "with recompute" is as if every layer were computed again,
which --memory may make unnecessary. Peers get the same tokens. "does not fit" is a result.
"""

import gc
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from contestants import Contestant, Halves, Ours, make_peers, make_weights
from flops import matmul_rate, step_flops
from record import OutOfTime, Part, Record, Until
from shapes import OTHERS, SIZES, TINY, text_facts, write_shape
from texts import random_examples
from training_report import plot, show
from transformers import AutoTokenizer

from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.shared_weights import bind
from worker.trainer.device import choose_way
from worker.trainer.kernel_warmup import warm_up
from worker.utils import torch_setup

KNOWN = ", ".join(SIZES + OTHERS)


def bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Bench:
    """One size's weights and contestants. memory: GB that the plan of ours may count on."""

    def __init__(self, size: str, budgets: Sequence[int], device: torch.device, memory: float, peers: bool) -> None:
        self.size, self.facts, self.device = size, text_facts(size), device
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        model_dir = write_shape(size, Path(self._folder.name) / "model")
        self.tensors = make_weights(model_dir, device)
        self.contestants: list[Contestant] = []
        theirs = make_peers(model_dir, self.tensors) if peers else []
        tokenizer, h = AutoTokenizer.from_pretrained(model_dir), Hyperparameters(max_length=max(budgets))
        gradients = 2e-9 * sum(tensor.numel() for tensor in self.tensors.values())  # GB
        ways: tuple[Way, ...] = ("streaming", "burst")
        for apply in ways:
            may = memory + (gradients if apply == "burst" else 0.0)
            model = bind.build_model(model_dir, self.tensors)
            settings = ApplySettings(apply=apply, memory=may)
            choose_way(model, model_dir, h, settings, max(budgets), device)
            ours = Ours(model, tokenizer, way=apply, budget=max(budgets))
            if device.type == "cuda":
                ours.trainer.sizes = tuple(sorted(budgets))  # no other row is warmed up, nor packed
            self.contestants.append(ours)
        self.contestants += theirs
        self.rate = matmul_rate(device)

    @property
    def streaming(self) -> Ours:
        ours = self.contestants[0]
        assert isinstance(ours, Ours)
        return ours

    def about(self) -> dict[str, Any]:
        return {
            "parameters": sum(tensor.numel() for tensor in self.tensors.values()),
            "weights_bytes": sum(tensor.nbytes for tensor in self.tensors.values()),
            "matmul_tflop_s": self.rate / 1e12,
            "state_bytes": {one.name: one.state_bytes for one in self.contestants},
        }

    def warm_up(self) -> dict[str, float]:
        """Seconds by shape."""
        with bar() as progress:
            task = progress.add_task(f"{self.size}: warming up")
            done = warm_up(
                self.streaming.trainer,
                lambda done, all, what: progress.update(
                    task, completed=done, total=all, description=f"{self.size}: warming up, {what}"
                ),
            )
        return done.seconds

    def row(self, one: Contestant, lengths: Sequence[int], steps: Sequence[Halves], peak: int) -> dict[str, Any]:
        seconds = statistics.median(halves.first + halves.second for halves in steps)
        flops = step_flops(self.facts, lengths)
        return {
            one.halves[0]: statistics.median(halves.first for halves in steps),
            one.halves[1]: statistics.median(halves.second for halves in steps),
            "step_s": seconds,
            "spread_s": max(h.first + h.second for h in steps) - min(h.first + h.second for h in steps),
            "tokens_per_s": sum(lengths) / seconds,
            "mfu": flops.model / seconds / self.rate,
            "with_recompute": (flops.model + flops.recompute) / seconds / self.rate,
            "peak_bytes": peak,
        }

    def close(self) -> None:
        self.contestants.clear()
        self.tensors.clear()
        self._folder.cleanup()
        reclaim(self.device)


def reclaim(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def total_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else float("inf")


def timed(one: Contestant, examples: Sequence[Example], device: torch.device) -> tuple[Halves, int]:
    """One step, and the most bytes it had allocated beyond what was there before (0 on a CPU, which does not count)."""
    if device.type != "cuda":
        return one.step(examples), 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    halves = one.step(examples)
    return halves, torch.cuda.max_memory_allocated(device) - before


def configuration(bench: Bench, lengths: list[int], rounds: int, part: Part) -> None:
    """All contestants on sequences of `lengths` tokens, interleaved."""
    steps: dict[str, list[Halves]] = {one.name: [] for one in bench.contestants}
    peaks: dict[str, int] = dict.fromkeys(steps, 0)
    out: dict[str, str] = {}
    for one in bench.contestants:
        if one.least_bytes > total_bytes(bench.device):
            out[one.name] = f"does not fit: weights, gradients and state alone take {one.least_bytes / 1e9:.0f} GB"
    with bar() as progress:
        task = progress.add_task(f"{bench.size}: {len(lengths)} x {lengths[0]}", total=(rounds + 1) * len(steps))
        for round_ in range(rounds + 1):
            examples = random_examples(lengths, bench.facts["vocab_size"], seed=round_)
            for one in bench.contestants:
                progress.advance(task)
                if one.name in out:
                    continue
                halves, peak, problem = attempt(one, examples, bench.device)
                if problem:
                    out[one.name] = problem
                    one.forget()
                    reclaim(bench.device)  # after the error has let go of what it held
                elif halves is not None and round_:  # the first is not timed
                    steps[one.name].append(halves)
                    peaks[one.name] = max(peaks[one.name], peak)
                    part.keep(one.name, bench.row(one, lengths, steps[one.name], peaks[one.name]))
    for name, reason in out.items():
        part.keep(name, {"no figure": reason})
    for one in bench.contestants:
        part[one.name] = part.figures[one.name]
        part.check(f"{one.name} is measured", not isinstance(one, Ours) or one.name not in out)


def attempt(one: Contestant, examples: Sequence[Example], device: torch.device) -> tuple[Halves | None, int, str]:
    """(its halves, its peak, "") or (None, 0, why there are none). A peer that fails must not cost our own figures."""
    try:
        return *timed(one, examples, device), ""
    except torch.OutOfMemoryError as error:
        return None, 0, f"does not fit: over {one.least_bytes / 1e9:.0f} GB; {str(error).split('. ')[0]}"
    except Exception as error:
        return None, 0, f"failed: {type(error).__name__}: {error}"


def profile(bench: Bench, lengths: list[int], path: Path) -> None:
    """One streaming step under torch's profiler: the 40 kernels that took longest, into `path`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    examples = random_examples(lengths, bench.facts["vocab_size"], seed=0)
    bench.streaming.step(examples)
    cuda = bench.device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        bench.streaming.step(examples)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90) + "\n")


def measure(record: Record, size: str, options: dict[str, Any], budgets: list[int], device: torch.device) -> None:
    benches: list[Bench] = []

    def set_up(part: Part) -> None:
        benches.append(Bench(size, budgets, device, options["memory"], options["peers"]))
        for key, value in benches[0].about().items():
            part[key] = value
        part["warm_up_s"] = benches[0].warm_up()

    try:
        if not record.part(f"{size}, set up", set_up):
            return
        for budget in sorted(budgets, reverse=True):
            mixes = {"packed": [budget // options["sequences"]] * options["sequences"], "one": [budget]}
            for mix in options["mixes"]:
                lengths = mixes[mix]

                def work(part: Part, mix: str = mix, lengths: list[int] = lengths) -> None:
                    part["tokens"], part["mix"] = sum(lengths), mix
                    configuration(benches[0], lengths, options["rounds"], part)

                record.part(f"{size}, {len(lengths)} x {lengths[0]}", work)
            if options["profile"] and budget == max(budgets):
                path = options["out"] / f"profile_{size}_{budget}.txt"
                lengths = [budget // options["sequences"]] * options["sequences"]
                record.part(
                    f"{size}, profile", lambda part, lengths=lengths, path=path: profile(benches[0], lengths, path)
                )
    finally:
        for bench in benches:
            bench.close()


@click.command()
@click.option("--sizes", default="0.8B,27B", show_default=True, help=f"Of {KNOWN}; comma-separated.")
@click.option("--budgets", default="512,1024,2048,4096,8192", show_default=True, help="Tokens a step.")
@click.option("--sequences", default=8, show_default=True, help="Of a packed step, of equal length.")
@click.option(
    "--mixes",
    default=["packed", "one"],
    multiple=True,
    type=click.Choice(["packed", "one"]),
    show_default=True,
    help="Several sequences a step, or a single long one; may be repeated.",
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--memory", default=13.5, show_default=True, help="GB for ours, weights aside; burst: and the gradients.")
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--profile", is_flag=True, help="Profile a streaming step at the largest budget of each size.")
@click.option("--plot", is_flag=True, help="Also OUT/training.png.")
@click.option("--seconds", default=560.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(**options: Any) -> None:
    """Measure training by itself; OUT/training.json is whole after every figure."""
    budgets, sizes = [int(word) for word in options["budgets"].split(",")], options["sizes"].split(",")
    if unknown := set(sizes) - {*SIZES, *OTHERS}:
        raise click.UsageError(f"--sizes: unknown {', '.join(sorted(unknown))}; choose from {KNOWN}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not set(sizes) <= set(TINY):
        raise click.UsageError(f"without an NVIDIA GPU only --sizes {','.join(TINY)} can be tried")
    outputs.folder(options["out"])
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the memory plan
    torch_setup.prepare()
    until = Until(options["seconds"])
    record = Record(options["out"] / "training.json")
    try:
        for size in sizes:
            measure(record, size, options, budgets, device)
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    until.disarm()
    show(record)
    if options["plot"]:
        plot(record.parts.items(), options["out"] / "training.png")
    record.summary()


if __name__ == "__main__":
    main()
