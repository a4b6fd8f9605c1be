"""Checks of short_rows.py: whether graphs give what the layers give, which layer can be captured, what a worker that
replays makes of its weights, and what a failed capture leaves behind.

Must not know: times.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from memory import device_used
from record import Part
from texts import random_examples
from trainer_bench import Bench

from worker.memory.graphs import graphs_beside
from worker.memory.model_config import TextConfig
from worker.memory.planner import CONTEXT_BYTES
from worker.model.inputs import PLACES, packing_of
from worker.trainer.kernel_warmup import warm_up
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
                made[f"{name} dY {number}"], made[f"{name} X {number}"] = one.left.clone(), one.right.detach().clone()
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


def capture(trainer: Trainer, size: int) -> None:
    """Graphs of a row. Raises RuntimeError; what failed is in the log."""
    if not trainer.capture(size):
        raise RuntimeError(f"a row of {size} tokens was not captured")


def cuts(size: int) -> list[list[int]]:
    """Ways to cut a row: as captured, in thirds, with a remainder of each kind, in 8, short with much padding."""
    return [
        [size],
        [size // 3, size - size // 3],
        [2, 63, 64, 65],
        [size // 8] * 8,
        [size // PLACES] * PLACES,
        [size // 2 + 7],
        [129, 200],
    ]


def equal(bench: Bench, size: int, part: Part, *, exact: bool) -> None:
    trainer = bench.trainer("factors", (size,), size)
    with deterministic() if exact else nullcontext():
        plain = [(left(trainer, some, bench.vocabulary), left(trainer, some, bench.vocabulary)) for some in cuts(size)]
        capture(trainer, size)
        for lengths, (first, second) in zip(cuts(size), plain, strict=True):
            for again in range(2):
                graphs = left(trainer, lengths, bench.vocabulary)
                part.check(f"{lengths}: it was replayed", trainer.replayed)
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


def steps(bench: Bench, trainer: Trainer, cuts: list[list[int]], device_bytes: dict[str, int]) -> dict[str, Any]:
    """One optimizer step over each of `cuts`, and what each said."""
    found: dict[str, Any] = {"losses": [], "norms": [], "replayed": [], "peak_bytes": []}
    for seed, lengths in enumerate(cuts):
        found["losses"].append(trainer.begin(random_examples(lengths, bench.vocabulary, seed)).loss)
        found["norms"].append(trainer.gradient_norm())
        trainer.prepare()
        found["replayed"].append(trainer.replayed)
        found["peak_bytes"].append(trainer.apply()["peak_bytes"])
        trainer.optimizer.check()
        device_bytes["reserved by torch, at most"] = torch.cuda.max_memory_reserved()
    return found


def as_a_worker(bench: Bench, size: int, longer: int, part: Part) -> None:
    """A warm-up that captures, then steps over short rows, replayed, with long ones in between; against the same steps
    launched, from the same weights, twice: they say what a backward pass repeats."""
    chosen = bench.chosen
    part["chosen"] = str(chosen)
    part.check("graphs were planned", size in chosen.replayed)
    rows = [[size], [longer], [size // 3, size - size // 3], [size // 8] * 8, [longer - 100], [size // 2 + 7], [longer]]
    short = [max(lengths) <= size for lengths in rows]
    start = {name: tensor.clone() for name, tensor in bench.tensors.items()}
    first: dict[str, torch.Tensor] = {}
    said: dict[str, dict[str, Any]] = {}
    apart: dict[str, float] = {}
    for name in ("launched", "again", "replayed"):
        for key, tensor in bench.tensors.items():
            tensor.copy_(start[key])
        trainer = bench.trainer(chosen.way, (size, longer), longer)
        trainer.by_factors = chosen.by_factors
        part[f"{name}: warm-up s"] = warm_up(trainer, replayed=(size,) if name == "replayed" else ()).seconds
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        used: dict[str, int] = {}
        said[name] = steps(bench, trainer, rows * 2, used)
        part[name] = said[name] | used
        if not first:
            first = {key: tensor.clone() for key, tensor in bench.tensors.items()}
            moved = torch.stack([(first[key].float() - start[key].float()).square().sum() for key in start]).sum()
            continue
        other = torch.stack([(first[key].float() - bench.tensors[key].float()).square().sum() for key in start]).sum()
        apart[name] = float((other / moved).sqrt())
        part[f"{name}: from launched, of what the steps moved"] = apart[name]
        part[f"{name}: tensors that differ"] = sum(not torch.equal(first[key], bench.tensors[key]) for key in start)
    part["held by the graphs, bytes"] = trainer.rows.held_bytes
    config = TextConfig.read(bench.model_dir / "config.json")
    graphs = graphs_beside(
        config, (size, longer), int(bench.memory * 1e9), way=chosen.way, by_factors=True, embeddings="apollo",
        context_bytes=CONTEXT_BYTES,
    )  # fmt: skip
    part["planned for the graphs, bytes"], part["used on the device beside the weights"] = (
        graphs.held,
        (device_used() - sum(tensor.nbytes for tensor in (*bench.tensors.values(), *start.values(), *first.values()))),
    )
    part.check("the graphs hold no more than planned", trainer.rows.held_bytes <= graphs.held)
    part.check("short rows were replayed, and no other", said["replayed"]["replayed"] == short * 2)
    part.check("launched trainers replay nothing", not any(said["launched"]["replayed"]))
    part.check("as near as launched ones are to each other", apart["replayed"] <= 3 * apart["again"])


def after_a_failure(bench: Bench, size: int, part: Part) -> None:
    """A capture that waits for the device fails; training, random numbers and the next capture go on."""
    trainer = bench.trainer("factors", (size,), size)
    before = left(trainer, [size], bench.vocabulary)
    again = left(trainer, [size], bench.vocabulary)

    def wait(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    torch.manual_seed(1)
    expected = torch.rand(4, device=bench.device)
    torch.manual_seed(1)
    hook = bench.model.model.layers[1].register_forward_hook(wait)
    part.check("it fails", not trainer.capture(size))
    hook.remove()
    part.check("random numbers go on", torch.equal(torch.rand(4, device=bench.device), expected))
    part.check("on the same stream", torch.cuda.current_stream() == torch.cuda.default_stream())
    for name in ("launched", "replayed"):
        found = left(trainer, [size], bench.vocabulary)
        unsteady, other = differing(before, again), differing(before, found)
        part[f"{name}: not the same"] = [len(unsteady), len(other), max(other.values(), default=0.0)]
        part.check(f"{name}: as before", max(other.values(), default=0.0) < 0.05)
        part.check(f"{name}: that it is", trainer.replayed == (name == "replayed"))
        if name == "launched":
            capture(trainer, size)
