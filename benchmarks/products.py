"""A step from factors on one GPU: gradients that are formed and then applied, against products applied as such.

    python benchmarks/products.py --layers 16 --tokens 400 --out results
    python benchmarks/products.py --tiling 128,128,64,8,3,2,128,0 --tiling 128,256,64,8,3,2,255,0 --out results

Shapes are those of Qwen3.5-27B's layers and its output head; weights and factors are random. Formed: cuBLAS writes a
bucket of 1 GiB of gradients in bf16, which pass 1 reads for R and the norm, and pass 2 for the weights. Products: one
kernel forms a tile in fp32 and moves the weights by it; R comes from the factors, the norm is given in both. Every
round times each way once, in turn; medians. The floors are computed: products at the rate that a large product of
cuBLAS reached here, and weights read and written at the rate of a copy.
A tiling is rows, columns and tokens of a tile, warps, stages, splits, registers, down (worker/apollo/launch_tables.py).
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
from worker.apollo.cuda import CudaBackend
from worker.apollo.launch_tables import Tiling

BUCKET = 1 << 30


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


def formed(case: Case) -> Callable[[], None]:
    optimizer = ApolloMini(case.weights, lr=1e-5)
    largest = max(BUCKET, max(weight.nbytes for weight in case.weights))
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

    def step() -> None:
        optimizer.begin()
        for bucket in buckets:
            for one, place in bucket:
                left, right, _ = one.parts[0]
                torch.mm(left.t(), right, out=place)
            optimizer.update_many([(one.weight, place) for one, place in bucket])
        optimizer.finish()

    return step


def as_products(case: Case, tiling: Tiling) -> Callable[[], None]:
    make_backend = ApolloMini._make_backend
    ApolloMini._make_backend = lambda self, device: CudaBackend(self._slots, self.area, self._options, tiling)  # type: ignore[method-assign]
    try:
        optimizer = ApolloMini(case.weights, lr=1e-5)
    finally:
        ApolloMini._make_backend = make_backend  # type: ignore[method-assign]
    refused = [one for one in case.given if not optimizer.takes_product(one.weight, one.parts)]
    assert not refused, [one.weight.shape for one in refused]
    prepared = optimizer.prepare_products(case.given)

    def step() -> None:
        optimizer.begin()
        optimizer.update_products(prepared)
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


def tiling_of(text: str) -> Tiling:
    if text == "default":
        return Tiling()
    rows, cols, tokens, warps, stages, splits, registers, down = map(int, text.split(","))
    return Tiling(
        product=(rows, cols, tokens), product_warps=warps, product_stages=stages, product_splits=splits,
        product_registers=registers, product_down=bool(down),
    )  # fmt: skip


def compare(case: Case, tilings: list[str], rounds: int, until: Until, part: Part) -> None:
    ways = {"formed": formed(case)} | {text: as_products(case, tiling_of(text)) for text in tilings}
    times: dict[str, list[float]] = {}
    for name, step in dict(ways).items():
        try:
            for _ in range(2):
                milliseconds(step)
        except Exception as error:  # a tiling that does not fit this device
            part[f"{name}: refused"] = str(error)[:200]
            del ways[name]
    for _ in range(rounds):
        for name, step in ways.items():
            times.setdefault(name, []).append(milliseconds(step))
        part["ms"] = {name: round(statistics.median(found), 3) for name, found in times.items()}
        if until.left < 5:
            break
    whole = 53.8e9 / case.bytes
    part["ms, for all of 27B"] = {name: round(statistics.median(found) * whole, 1) for name, found in times.items()}
    part["worst ms"] = {name: round(max(found), 3) for name, found in times.items()}
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.3f} ms, 27B {statistics.median(found) * whole:.1f}", flush=True)


@click.command()
@click.option("--layers", default=16, show_default=True, help="Of the 64.")
@click.option("--tokens", default="400", show_default=True, help="Of the factors; several, separated by commas.")
@click.option("--head/--no-head", default=True, show_default=True)
@click.option("--tiling", "tilings", multiple=True, default=("default",), show_default=True)
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
        copy = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(5))
        part["copy_tb_s"] = 2 * source.nbytes / copy / 1e9
        part["weights_ms"] = 2 * 53.8e9 / part["copy_tb_s"] / 1e9

    record.part("floors", floors)
    for tokens in map(int, options["tokens"].split(",")):
        case = make(options["layers"], tokens, options["head"])
        tilings, rounds = options["tilings"], options["rounds"]
        record.part(f"{tokens} tokens", partial(compare, case, tilings, rounds, until))
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
