"""Training alone on one GPU: tokens/s, MFU, memory, by model size and token budget, ours and the peers interleaved.

    python benchmarks/training.py --sizes 0.8B,27B --out results --seconds 560
    python benchmarks/training.py --sizes tiny --budgets 512,256 --out results      # on a CPU: only that it works

Random weights, random token ids, every token but a sequence's first trained. Each configuration (size, budget, how many
sequences) has one untimed round and `--rounds` timed ones, all contestants in turn; medians. Memory is the most that a
step had allocated beyond what lay there before it: weights and optimizers' states. MFU counts forward and backward
(flops.py), against bf16 products measured in the same run. Peers get the same tokens. "does not fit" is a result.
"""

import gc
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contestants import Contestant, Halves, Ours, make_peers, make_weights
from flops import matmul_rate, step_flops
from record import OutOfTime, Part, Record, Until
from shapes import SIZES, text_facts, write_shape
from texts import random_examples
from transformers import AutoTokenizer

from worker import torch_setup
from worker.examples import Example
from worker.model import fuse
from worker.warm_up import warm_up

console = Console(width=140)


def bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


class Bench:
    """One size's weights and contestants."""

    def __init__(self, size: str, budgets: Sequence[int], device: torch.device, peers: bool) -> None:
        self.size, self.facts, self.device = size, text_facts(size), device
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-")
        model_dir = write_shape(size, Path(self._folder.name) / "model")
        self.tensors = make_weights(model_dir, device)
        self.contestants: list[Contestant] = []
        theirs = make_peers(model_dir, self.tensors) if peers else []
        from worker.weights import bind

        model = bind.build_model(model_dir, self.tensors)
        if device.type == "cuda":
            fuse(model)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        for streaming in (True, False):
            ours = Ours(model, tokenizer, streaming=streaming, budget=max(budgets))
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
            out[one.name] = f"weights, gradients and state alone take {one.least_bytes / 1e9:.0f} GB"
    vocabulary = bench.facts["vocab_size"]
    with bar() as progress:
        task = progress.add_task(f"{bench.size}: {len(lengths)} x {lengths[0]}", total=(rounds + 1) * len(steps))
        for round_ in range(rounds + 1):
            examples = random_examples(lengths, vocabulary, seed=round_)
            for one in bench.contestants:
                progress.advance(task)
                if one.name in out:
                    continue
                try:
                    halves, peak = timed(one, examples, bench.device)
                except torch.OutOfMemoryError as error:
                    out[one.name] = f"at least {one.least_bytes / 1e9:.0f} GB; {str(error).split('.')[0]}"
                    one.forget()
                    reclaim(bench.device)
                    continue
                if round_:  # the first is not timed
                    steps[one.name].append(halves)
                    peaks[one.name] = max(peaks[one.name], peak)
            for one in bench.contestants:
                if steps[one.name]:
                    part[one.name] = bench.row(one, lengths, steps[one.name], peaks[one.name])
    for name, reason in out.items():
        part[name] = {"does not fit": reason}


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


def show(record: Record) -> None:
    table = Table(title="Training alone: medians")
    for column in ("size, sequences", "who", "tokens/s", "MFU", "with recompute", "step s", "halves s", "peak GB"):
        table.add_column(column, justify="left" if column in ("size, sequences", "who") else "right")
    for name, part in record.parts.items():
        for who, row in part.items():
            if not isinstance(row, dict):
                continue
            if "does not fit" in row:
                table.add_row(name, who, "does not fit", row["does not fit"])
            elif "tokens_per_s" in row:
                first, second = list(row)[:2]
                halves = f"{row[first]:.3f} + {row[second]:.3f}"
                shares = (f"{row['mfu']:.1%}", f"{row['with_recompute']:.1%}")
                cells = (f"{row['tokens_per_s']:,.0f}", *shares, f"{row['step_s']:.3f}", halves)
                table.add_row(name, who, *cells, f"{row['peak_bytes'] / 1e9:.2f}")
    console.print(table)


def plot(record: Record, path: Path) -> None:
    """Tokens/s over the token budget, a panel a size, packed sequences only."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, part in record.parts.items():
        if part.get("mix") != "packed":
            continue
        panel = lines.setdefault(name.split(",")[0], {})
        for who, row in part.items():
            if isinstance(row, dict) and "tokens_per_s" in row:
                panel.setdefault(who, []).append((part["tokens"], row["tokens_per_s"]))
    if not lines:
        return
    figure = Figure(figsize=(5 * len(lines), 4), layout="constrained")
    for axes, (size, panel) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for who, points in panel.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=who)
        axes.set(xlabel="tokens a step", ylabel="tokens/s", title=size, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def measure(record: Record, size: str, options: dict[str, Any], budgets: list[int], device: torch.device) -> None:
    benches: list[Bench] = []

    def set_up(part: Part) -> None:
        benches.append(Bench(size, budgets, device, options["peers"]))
        for key, value in benches[0].about().items():
            part[key] = value
        part["warm_up_s"] = benches[0].warm_up()

    try:
        if not record.part(f"{size}, set up", set_up):
            return
        for budget in sorted(budgets, reverse=True):
            for mix, lengths in (
                ("packed", [budget // options["sequences"]] * options["sequences"]),
                ("one", [budget]),
            ):

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
@click.option("--sizes", default="0.8B,27B", show_default=True, help=f"Of {', '.join(SIZES)}; comma-separated.")
@click.option("--budgets", default="512,1024,2048,4096,8192", show_default=True, help="Tokens a step.")
@click.option("--sequences", default=8, show_default=True, help="Of a packed step, of equal length.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--peers/--no-peers", default=True, show_default=True)
@click.option("--profile", is_flag=True, help="Profile a streaming step at the largest budget of each size.")
@click.option("--plot", is_flag=True, help="Also OUT/training.png.")
@click.option("--seconds", default=560.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(**options: Any) -> None:
    """Measure training by itself; OUT/training.json is whole after every figure."""
    budgets, sizes = [int(word) for word in options["budgets"].split(",")], options["sizes"].split(",")
    if unknown := set(sizes) - set(SIZES):
        raise click.UsageError(f"--sizes: unknown {', '.join(sorted(unknown))}; choose from {', '.join(SIZES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and sizes != ["tiny"]:
        raise click.UsageError("without an NVIDIA GPU only --sizes tiny can be tried")
    torch_setup.prepare()
    until = Until(options["seconds"])
    options["out"].mkdir(parents=True, exist_ok=True)
    record = Record(options["out"] / "training.json")
    try:
        for size in sizes:
            measure(record, size, options, budgets, device)
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    until.disarm()
    show(record)
    if options["plot"]:
        plot(record, options["out"] / "training.png")
    record.summary()


if __name__ == "__main__":
    main()
