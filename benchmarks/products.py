"""A step from factors on one GPU: decided from gradients, which are read twice, and decided from the factors.

    python benchmarks/products.py --layers 16 --tokens 400 --out results

Shapes are those of Qwen3.5-27B's layers and its output head; weights and factors are random. In every way cuBLAS writes
buckets of gradients in bf16. Updated: pass 1 reads them for R, pass 2 for the weights. Decided: R comes from the
factors, and only the weights' pass reads them. Overlapped: that pass runs beside the next bucket's products. The norm
is given. Every round times each way once, in turn; medians.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flops import matmul_rate
from optimizer_shapes import MODELS, layer_shapes
from record import Part, Record, Until

from worker.apollo import ApolloMini, GradientProduct

BUCKET = 1 << 30
BYTES = 53.8e9
"""Of 27B's weights."""


@dataclass(frozen=True)
class Case:
    """weights, and of each one product; the norm of every gradient."""

    weights: list[torch.Tensor]
    given: list[GradientProduct]

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


def make(layers: int, tokens: int, head: bool) -> Case:
    model = MODELS["27B"]
    shapes = [shape for layer in range(layers) for shape in layer_shapes(model, layer) if len(shape) == 2]
    shapes += [(model.vocab, model.hidden)] * head
    weights, given = [], []
    inputs: dict[int, torch.Tensor] = {}
    for rows, cols in shapes:
        weight = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        if cols not in inputs:
            inputs[cols] = torch.randn(tokens, cols, device="cuda").bfloat16()
        left = torch.randn(tokens, rows, device="cuda").mul_(1e-3).bfloat16()
        squares = torch.tensor(tokens * 1e-6 * rows * cols, device="cuda")
        weights.append(weight)
        given.append(GradientProduct(weight, [(left, inputs[cols], 0)], squares))
    return Case(weights, given)


def buckets_of(case: Case, least: int = BUCKET) -> list[list[tuple[GradientProduct, torch.Tensor]]]:
    """Each product, and where in one buffer of at least `least` bytes it is formed."""
    largest = max(least, max(weight.nbytes for weight in case.weights))
    buffer = torch.empty(largest, dtype=torch.uint8, device="cuda")
    buckets: list[list[tuple[GradientProduct, torch.Tensor]]] = []
    end = largest
    for one in sorted(case.given, key=lambda one: one.weight.shape[0] < one.weight.shape[1]):  # the optimizer's order
        if end + one.weight.nbytes > largest:
            buckets.append([])
            end = 0
        place = buffer[end : end + one.weight.nbytes].view(torch.bfloat16).view(one.weight.shape)
        buckets[-1].append((one, place))
        end += one.weight.nbytes
    return buckets


def form(bucket: list[tuple[GradientProduct, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    for one, place in bucket:
        left, right, _ = one.parts[0]
        torch.mm(left.t(), right, out=place)
    return [(one.weight, place) for one, place in bucket]


def updated(case: Case) -> Callable[[], None]:
    optimizer, buckets = ApolloMini(case.weights, lr=1e-5), buckets_of(case)

    def step() -> None:
        optimizer.begin()
        for bucket in buckets:
            optimizer.update_many(form(bucket))
        optimizer.finish()

    return step


def decided(case: Case) -> Callable[[], None]:
    optimizer = ApolloMini(case.weights, lr=1e-5)
    refused = [one for one in case.given if not optimizer.takes_product(one.weight, one.parts)]
    assert not refused, [one.weight.shape for one in refused]
    prepared, buckets = optimizer.prepare_products(case.given), buckets_of(case)

    def step() -> None:
        optimizer.begin()
        optimizer.decide_products(prepared)
        for bucket in buckets:
            optimizer.write(form(bucket))
        optimizer.finish()

    return step


def overlapped(case: Case) -> Callable[[], None]:
    """As `decided`, but that a bucket is written by another stream while the next is formed: two buckets of half the
    size. To be measured; no worker does it."""
    optimizer = ApolloMini(case.weights, lr=1e-5)
    prepared = optimizer.prepare_products(case.given)
    halves = [buckets_of(case, BUCKET // 2) for _ in range(2)]
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    free = [torch.cuda.Event() for _ in halves]

    def step() -> None:
        optimizer.begin()
        optimizer.decide_products(prepared)
        side.wait_stream(main)
        for number in range(len(halves[0])):
            half = number % 2
            if number > 1:
                main.wait_event(free[half])
            pairs = form(halves[half][number])
            side.wait_stream(main)
            with torch.cuda.stream(side):
                optimizer.write(pairs)
                free[half].record(side)
        main.wait_stream(side)
        optimizer.finish()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def compare(case: Case, rounds: int, until: Until, part: Part) -> None:
    ways = {"updated": updated(case), "decided": decided(case), "overlapped": overlapped(case)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in ways.values():
        for _ in range(2):
            milliseconds(step)
    for _ in range(rounds):
        for name, step in ways.items():
            times[name].append(milliseconds(step))
        if until.left < 5:
            break
    whole = BYTES / case.bytes
    part["ms"] = {name: round(statistics.median(found), 3) for name, found in times.items()}
    part["worst ms"] = {name: round(max(found), 3) for name, found in times.items()}
    part["ms, for all of 27B"] = {name: round(statistics.median(found) * whole, 1) for name, found in times.items()}


@click.command()
@click.option("--layers", default=16, show_default=True, help="Of the 64.")
@click.option("--tokens", default="400", show_default=True, help="Of the factors; several, separated by commas.")
@click.option("--head/--no-head", default=True, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--seconds", default=240.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(**options: Any) -> None:
    """Measure both; OUT/products.json is whole after every figure."""
    if not torch.cuda.is_available():
        raise click.UsageError("this measures a GPU, and there is none")
    options["out"].mkdir(parents=True, exist_ok=True)
    record, until = Record(options["out"] / "products.json"), Until(options["seconds"])
    device = torch.device("cuda")

    def floors(part: Part) -> None:
        part["matmul_tflop_s"] = matmul_rate(device) / 1e12
        source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(5)) / 1000
        part["copy_tb_s"] = 2 * source.nbytes / seconds / 1e12
        part["weights read and written, ms"] = 2 * BYTES * 1000 * seconds / (2 * source.nbytes)

    record.part("floors", floors)
    for tokens in map(int, options["tokens"].split(",")):
        case = make(options["layers"], tokens, options["head"])
        record.part(f"{tokens} tokens", partial(compare, case, options["rounds"], until))
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
