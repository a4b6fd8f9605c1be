"""Checks of short_rows.py: whether graphs give what the layers give, which layer can be captured, and in whose memory.

Must not know: times.
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pause import Bench
from record import Part
from texts import random_examples

from worker.model.inputs import packing_of
from worker.trainer.captured_row import CapturedRow
from worker.trainer.trainer import Trainer


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms where it has them; what it has not is told once."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def left(trainer: Trainer, lengths: list[int], vocabulary: int) -> dict[str, torch.Tensor]:
    """All that `begin` leaves over sequences of `lengths`: factors, gradients, losses, the norm. Copies."""
    found = trainer.begin(random_examples(lengths, vocabulary, sum(lengths)))
    made = {"losses": torch.tensor(list(found.nll.values())), "norm": torch.tensor(trainer.gradient_norm())}
    for name, parameter in trainer.model.named_parameters():
        if (kept := trainer.sweep.factors.of(parameter)) is not None:
            products, rows = kept.passes[-1]
            for number, one in enumerate(products):
                made[f"{name} dY {number}"], made[f"{name} X {number}"] = one.left.clone(), one.right.clone()
            made |= {f"{name} rows {number}": one.values.clone() for number, one in enumerate(rows)}
        elif parameter.grad is not None:
            made[f"{name} gradient"] = parameter.grad.clone()
    trainer.forget()
    return made


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """What is not the same bit for bit, and how far apart, relatively; infinite where one lacks it."""
    found = {name: float("inf") for name in one.keys() ^ other.keys()}
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.shape != b.shape:
            found[name] = float("inf")
        elif not torch.equal(a, b):
            apart = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            found[name] = apart if apart == apart else float("nan")
    return found


def capture(trainer: Trainer, size: int, part: Part) -> None:
    """Graphs of a row, in the first way that can make them; what the others said is kept."""
    for mode, threads in (("global", True), ("thread_local", True), ("relaxed", True), ("relaxed", False)):
        CapturedRow.mode = mode
        try:
            with torch.autograd.set_multithreading_enabled(threads):
                trainer.capture(size)
        except Exception:
            part[f"{size}: not captured, {mode}, threads {threads}"] = traceback.format_exc().splitlines()[-45:]
            torch.cuda.set_stream(torch.cuda.default_stream())
            trainer.forget()
        else:
            part[f"{size}: captured"] = [mode, threads]
            return
    raise RuntimeError(f"a row of {size} tokens was captured in no way")


def cuts(size: int) -> list[list[int]]:
    """Ways to cut a row: as captured, in thirds, with a remainder of each kind, in 8, short with much padding."""
    return [[size], [size // 3, size - size // 3], [2, 63, 64, 65], [size // 8] * 8, [size // 2 + 7], [129, 200]]


def equal(bench: Bench, size: int, part: Part, *, exact: bool) -> None:
    trainer = bench.trainer("factors", (size,), size)
    with deterministic() if exact else nullcontext():
        plain = [(left(trainer, some, bench.vocabulary), left(trainer, some, bench.vocabulary)) for some in cuts(size)]
        capture(trainer, size, part)
        for lengths, (first, second) in zip(cuts(size), plain, strict=True):
            for again in range(2):
                graphs = left(trainer, lengths, bench.vocabulary)
                unsteady, other = differing(first, second), differing(first, graphs)
                most = max(other.values(), default=0.0)
                part[f"{lengths}, {again}"] = {
                    "tensors": len(first),
                    "launched twice and not the same": [len(unsteady), max(unsteady.values(), default=0.0)],
                    "replayed and not the same": [len(other), most, dict(sorted(other.items())[:6])],
                }
                finite = all(bool(torch.isfinite(value).all()) for value in graphs.values())
                part.check(f"{lengths}: all is finite", finite)
                part.check(f"{lengths}: what repeats is the same by graphs", set(other) <= set(unsteady))
                part.check(f"{lengths}: the rest is near", most < 0.05)


def captured_layer(bench: Bench, number: int, size: int, part: Part) -> None:
    """Forward and backward of one layer alone, as graphs, against the layer's own."""
    layer, device = bench.model.model.layers[number], bench.device
    layer.gradient_checkpointing = False
    hidden = torch.randn(1, size, bench.model.config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    positions, packing = torch.arange(size, device=device)[None], packing_of([size]).to(device)
    with torch.no_grad():
        rotary = bench.model.model.rotary_emb(hidden, positions.expand(3, 1, -1))
    outer = torch.randn_like(hidden)

    def forward() -> torch.Tensor:
        return layer(hidden, position_embeddings=rotary, attention_mask=None, packing=packing, use_cache=False)  # type: ignore[no-any-return]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            (expected,) = torch.autograd.grad(forward(), [hidden], outer)
    torch.cuda.synchronize()
    graphs: list[Any] = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.graph(graphs[0], pool=pool, stream=stream):
        made = forward()
    part["forward"] = "captured"
    with torch.cuda.graph(graphs[1], pool=pool, stream=stream):
        (gradient,) = torch.autograd.grad(made, [hidden], outer)
    part["backward"] = "captured"
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    part["apart"] = float((gradient.double() - expected.double()).norm() / expected.double().norm())
    part.check("near", part.figures["apart"] < 0.02)


def shared(bench: Bench, sizes: list[int], longer: int, part: Part) -> None:
    """Graphs of several rows, and a long row as ever, in one pool on one stream: no more memory than the largest."""
    sizes = sorted(set(sizes))
    trainer = bench.trainer("factors", (*sizes, longer), longer)
    pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def held(name: str) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        part[name] = torch.cuda.memory_reserved() - before
        return int(part.figures[name])

    def as_ever(tokens: int) -> None:
        with torch.cuda.use_mem_pool(pool):
            trainer.dry_run(random_examples([tokens], bench.vocabulary, 1))

    expected = {size: left(trainer, [size], bench.vocabulary) for size in sizes}
    again = {size: left(trainer, [size], bench.vocabulary) for size in sizes}
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False):
        as_ever(longer)
        most = held("a long row, bytes")
        for size in reversed(sizes):
            trainer.capture(size, pool.id, stream)
            held(f"and graphs of {size}")
        as_ever(longer)
        part.check("no more than the long row alone", held("and the long row again") <= most + (64 << 20))
        for size in sizes:
            found = left(trainer, [size], bench.vocabulary)
            torch.cuda.synchronize()
            unsteady, other = differing(expected[size], again[size]), differing(expected[size], found)
            part[f"{size} tokens"] = [len(unsteady), len(other), max(other.values(), default=0.0)]
            part.check(f"{size} tokens: as before, or near", max(other.values(), default=0.0) < 0.05)
