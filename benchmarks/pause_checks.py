"""Checks of pause.py: that products, norms and whole steps by factors have the bits of those that autograd makes.

Must not know: times.
"""

import torch
from record import Part
from texts import random_examples
from torch.nn import functional
from trainer_bench import Bench

from worker.data.batch_capacity import sizes_up_to
from worker.memory.plan import Way
from worker.model.factors import Product, Rows
from worker.trainer.trainer import Trainer


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
    """Two streamed steps and one by factors, each from the same weights and state. On a GPU moments
    come from products that are not rounded, so that the step is another: how many elements differ is said, of two
    streamed steps too."""
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
    if device.type == "cpu":
        part.check("what streaming repeats, factors give too", set(differ) <= set(unsteady))
    else:
        elements = sum(tensor.numel() for tensor in start.values())
        for name in ("again", "factors"):
            apart = sum(int((ends[name][key] != ends["streaming"][key]).sum()) for key in start)
            part[f"elements unlike streaming's: {name}"] = apart / elements
    moved = sum(not torch.equal(ends["factors"][key], start[key]) for key in start)
    part.check("the steps moved the weights", moved > len(start) / 2)
    bench.close()
