"""What every implementation of APOLLO-Mini has to do, against a float64 transcription of the paper's formulas.

The checks take a device: test_apollo_golden.py runs them on a CPU, test_apollo_gpu.py on CUDA, and test_factored.py and
test_factored_gpu.py, where they hold for it, with the factored rule.
"""

import math

import torch
from torch import Tensor

from worker.apollo import ApolloMini

SHAPES = [(5, 7), (7, 5), (1, 7), (300, 1), (33, 33), (130, 70), (70, 130), (64, 520), (520, 64), (8, 1025)]
STEPS, GAP = 23, 5
CPU = "cpu"


def given_projection(index: int, shape: tuple[int, int], draw: int) -> Tensor:
    """A projection that both sides are given, and that neither makes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * index + draw))


def given_gradients(shapes: list[tuple[int, ...]], steps: int, seed: int = 0) -> list[list[Tensor]]:
    """fp32 [steps][parameters], with a common direction, so that steps accumulate, and a scale that varies."""
    generator = torch.Generator().manual_seed(seed)
    drift = [torch.randn(shape, generator=generator) for shape in shapes]
    return [
        [
            (0.5 * d + torch.randn(d.shape, generator=generator)) * 10 ** (-3 + math.sin(t))
            for d in drift
        ]
        for t in range(steps)
    ]  # fmt: skip


def oracle(weight: Tensor, gradients: list[Tensor], index: int, *, lr, scale, front, decay, gap, eps=1e-8) -> Tensor:
    """The formulas of arXiv 2412.05270 for one matrix, in float64, written from the paper alone."""
    w = weight.double()
    m = v = previous = None
    beta1, beta2, gamma = 0.9, 0.999, 1.01
    for t, g in enumerate((g.double() for g in gradients), start=1):
        rows, cols = g.shape
        p_shape = (1, cols) if rows >= cols else (rows, 1)
        p = given_projection(index, p_shape, (t - 1) // gap).double()
        r = g @ p.T if rows >= cols else p.T @ g
        m = (1 - beta1) * r if m is None else beta1 * m + (1 - beta1) * r
        v = (1 - beta2) * r**2 if v is None else beta2 * v + (1 - beta2) * r**2
        n = m / (v.sqrt() + eps)
        u = g * (n.norm() / (r.norm() + 1e-8))
        if front:
            u = u * math.sqrt(scale)
        if previous is not None:
            u = u / (max(u.norm() / (previous + 1e-8), gamma) / gamma)
        previous = u.norm()
        if not front:
            u = u * math.sqrt(scale)
        w = w - lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * u
        w = w * (1 - lr * decay)
    return w


def adamw_oracle(weight: Tensor, gradients: list[Tensor], *, lr, decay, eps=1e-8) -> Tensor:
    """AdamW in float64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate((g.double() for g in gradients), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + eps)
        w = w * (1 - lr * decay)
    return w


def start_weights(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [0.02 * torch.randn(shape, generator=generator) for shape in shapes]


def run(weights: list[Tensor], gradients: list[list[Tensor]], device: str = CPU, **options) -> list[Tensor]:
    """Final weights, on the CPU, after one step for each list of gradients, which are given in their own dtype."""
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini(parameters, **options)
    for step in gradients:
        optimizer.step(grads=[g.to(device) for g in step])
    return [p.detach().cpu() for p in parameters]


def relative(ours: Tensor, wanted: Tensor, start: Tensor) -> float:
    """Error of the total update, relative to it."""
    return float((ours.double() - wanted).norm() / (wanted - start.double()).norm())


def check_golden(device: str, front: bool, decay: float, scale: float = 16.0, lr: float = 1e-2) -> None:
    weights, gradients = start_weights(SHAPES), given_gradients(SHAPES, STEPS)
    ours = run(
        weights, gradients, device, lr=lr, scale=scale, scale_front=front, weight_decay=decay, projection_gap=GAP,
        projection=given_projection,
    )  # fmt: skip
    errors = {}
    for i, shape in enumerate(SHAPES):
        mine = [step[i] for step in gradients]
        wanted = oracle(weights[i], mine, i, lr=lr, scale=scale, front=front, decay=decay, gap=GAP)
        errors[shape] = relative(ours[i], wanted, weights[i])
    assert max(errors.values()) < 2e-6, errors


def check_adamw(device: str) -> None:
    shapes = [(5,), (1, 1), (70, 1, 4), (3000,)]
    weights, gradients = start_weights(shapes), given_gradients(shapes, STEPS)
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini([{"params": parameters, "algorithm": "adamw"}], lr=1e-3, weight_decay=0.01)
    for step in gradients:
        optimizer.step(grads=[g.to(device) for g in step])
    for i, parameter in enumerate(parameters):
        wanted = adamw_oracle(weights[i], [step[i] for step in gradients], lr=1e-3, decay=0.01)
        assert relative(parameter.detach().cpu(), wanted, weights[i]) < 2e-6


def mixed_weights() -> list[Tensor]:
    """bf16 and fp32, matrices, a vector and a convolution."""
    weights = start_weights([(130, 70), (70, 136), (300,), (12, 1, 4), (40, 64)])
    return [w.bfloat16() if i < 4 else w for i, w in enumerate(weights)]


def check_repeatable(device: str, **options) -> None:
    weights = mixed_weights()
    gradients = [[g.bfloat16() for g in step] for step in given_gradients([tuple(w.shape) for w in weights], 7)]
    first, again = (run(weights, gradients, device, lr=1e-3, projection_gap=3, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, w) for a, w in zip(first, weights, strict=True))


def check_nearest_is_the_rounded_fp32_result(device: str, **options) -> None:
    """One step, so that both start from the same weights."""
    weights = [w.bfloat16() for w in start_weights(SHAPES)]
    gradients = given_gradients(SHAPES, 1)
    rounded = run(weights, gradients, device, lr=1e-3, rounding="nearest", **options)
    exact = run([w.float() for w in weights], gradients, device, lr=1e-3, **options)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(rounded, exact, strict=True))


def check_stochastic_takes_a_neighbour_without_bias(device: str, seeds: int = 64, **options) -> None:
    weights = [w.bfloat16() for w in start_weights([(33, 33), (24, 64)])]
    gradients = given_gradients([(33, 33), (24, 64)], 1)
    fixed = {"lr": 1e-3, "projection": given_projection} | options
    exact = run([w.float() for w in weights], gradients, device, **fixed)
    sums = [torch.zeros_like(w) for w in exact]
    for seed in range(seeds):
        for total, got, wanted in zip(sums, run(weights, gradients, device, seed=seed, **fixed), exact, strict=True):
            low, high = neighbours(wanted)
            assert ((got == low) | (got == high)).all()
            total += got.float()
    for total, wanted in zip(sums, exact, strict=True):
        low, high = (x.double() for x in neighbours(wanted))
        share = (wanted.double() - low) / (high - low).clamp_min(1e-30)  # how often the upper one is due
        error = (total.double() / seeds - wanted.double()).sum()
        deviation = ((high - low) ** 2 * share * (1 - share) / seeds).sum().sqrt()
        assert abs(error) < 4 * deviation
        assert deviation > 0


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers on both sides of each fp32 one (equal where it is one itself)."""
    raw = value.view(torch.int32)
    toward_zero = (raw & ~0xFFFF).view(torch.float32)
    away = ((raw & ~0xFFFF) + 0x10000 * (raw & 0xFFFF != 0).int()).view(torch.float32)
    return torch.minimum(toward_zero, away).bfloat16(), torch.maximum(toward_zero, away).bfloat16()


def check_row_slices(device: str, **options) -> None:
    """Slices of a merged weight, and rows further apart than they are long, give what separate weights give."""
    parts = [w.bfloat16() for w in start_weights([(48, 40), (16, 40), (30, 24)])]
    gradients = [[g.bfloat16() for g in step] for step in given_gradients([(48, 40), (16, 40), (30, 24)], 4)]
    merged = torch.cat(parts[:2]).to(device)
    wide = torch.full((30, 64), 7.0, dtype=torch.bfloat16, device=device)
    wide[:, 8:32] = parts[2].to(device)
    views = [torch.nn.Parameter(merged[:48]), torch.nn.Parameter(merged[48:]), torch.nn.Parameter(wide[:, 8:32])]
    optimizer = ApolloMini(views, lr=1e-3, **options)
    for step in gradients:
        optimizer.step(grads=[g.to(device) for g in step])
    alone = run(parts, gradients, device, lr=1e-3, **options)
    assert torch.equal(merged.cpu(), torch.cat(alone[:2]))
    assert torch.equal(wide[:, 8:32].cpu(), alone[2])
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 32:] == 7).all()


def check_zero_gradient_is_harmless(device: str, **options) -> None:
    """The limiter's lock: an empty batch in between must not hold later steps near 0, nor change anything itself."""
    weights, gradients = start_weights([(64, 32)]), given_gradients([(64, 32)], 12)
    parameter = torch.nn.Parameter(weights[0].clone().to(device))
    optimizer = ApolloMini([parameter], lr=1e-3, weight_decay=0.1, **options)
    sizes = []
    for t, step in enumerate(gradients):
        before, state = parameter.detach().clone(), optimizer.area.memory.clone()
        optimizer.step(grads=[torch.zeros_like(parameter) if t == 6 else step[0].to(device)])
        if t == 6:
            assert torch.equal(parameter, before)
            changed = (optimizer.area.memory != state).nonzero().flatten().tolist()
            assert changed == [8]  # the step count's lowest byte
        sizes.append(float((parameter.detach() - before).norm()))
    assert optimizer.step_count == 12
    assert sizes[7] > 0.5 * sizes[5]


def check_update_rms(device: str, **options) -> None:
    weights = start_weights([(64, 32), (20,)])
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini(parameters, lr=1e-3, **options)
    optimizer.step(grads=[g.to(device) for g in given_gradients([(64, 32), (20,)], 1)[0]])
    moved = torch.cat([(p.detach().cpu() - w).flatten() for p, w in zip(parameters, weights, strict=True)])
    start = torch.cat([w.flatten() for w in weights])
    assert math.isclose(optimizer.last_update.update_rms, float(moved.square().mean().sqrt()), rel_tol=1e-4)
    assert math.isclose(optimizer.last_update.weight_rms, float(start.square().mean().sqrt()), rel_tol=1e-5)
