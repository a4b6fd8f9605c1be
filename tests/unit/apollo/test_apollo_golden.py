"""APOLLO-Mini against a float64 transcription of the paper's formulas, and its own promises, on a CPU.

The checks take a device, so that test_apollo_gpu.py runs the same ones on CUDA.
"""

import math

import pytest
import torch
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, NonFiniteGradientError

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


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_follows_float64_over_redraws(front: bool, decay: float) -> None:
    check_golden(CPU, front, decay)


def test_adamw_follows_float64() -> None:
    check_adamw(CPU)


def test_the_limiter_is_part_of_what_was_compared() -> None:
    """With gamma = inf the result differs, so the golden test would notice a missing limiter."""
    weights, gradients = start_weights(SHAPES), given_gradients(SHAPES, STEPS)
    options = {"lr": 1e-3, "projection_gap": GAP, "projection": given_projection}
    limited = run(weights, gradients, **options)
    free = run(weights, gradients, gamma=math.inf, **options)
    assert all(relative(a, b.double(), w) > 1e-2 for a, b, w in zip(limited, free, weights, strict=True))


def test_auto_scale_is_the_smaller_dimension() -> None:
    weights, gradients = start_weights([(48, 20)]), given_gradients([(48, 20)], 3)
    assert torch.equal(
        run(weights, gradients, lr=1e-3, scale="auto")[0], run(weights, gradients, lr=1e-3, scale=20.0)[0]
    )


def test_a_seed_decides_the_projection() -> None:
    weights, gradients = start_weights([(48, 20)]), given_gradients([(48, 20)], 3)
    first, again, other = (run(weights, gradients, lr=1e-3, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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


def test_bitwise_repeatable() -> None:
    check_repeatable(CPU)


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


def test_nearest_is_the_rounded_fp32_result() -> None:
    check_nearest_is_the_rounded_fp32_result(CPU)


def test_stochastic_takes_a_neighbour_without_bias() -> None:
    check_stochastic_takes_a_neighbour_without_bias(CPU)


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


def test_row_slices() -> None:
    check_row_slices(CPU)


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


def test_zero_gradient_is_harmless() -> None:
    check_zero_gradient_is_harmless(CPU)


def test_the_limiter_recovers_from_a_vanishing_gradient() -> None:
    """Not quite zero: the floor lets the step come back at once instead of at 1 % a step."""
    weights, gradients = start_weights([(64, 32)]), given_gradients([(64, 32)], 14)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = ApolloMini([parameter], lr=1e-3)
    sizes = []
    for t, step in enumerate(gradients):
        before = parameter.detach().clone()
        optimizer.step(grads=[step[0] * (1e-18 if t == 6 else 1)])
        sizes.append(float((parameter.detach() - before).norm()))
    assert sizes[6] < 1e-6 * sizes[5]
    assert sizes[7] > 5e-4 * sizes[5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_named(bad: float) -> None:
    weights, gradients = mixed_weights(), given_gradients([tuple(w.shape) for w in mixed_weights()], 2)
    parameters = [(f"p{i}", torch.nn.Parameter(w.clone())) for i, w in enumerate(weights)]
    optimizer = ApolloMini(parameters, lr=1e-3)
    optimizer.step(grads=gradients[0])
    before, state = [p.detach().clone() for _, p in parameters], optimizer.area.memory.clone()
    gradients[1][2][17] = bad
    with pytest.raises(NonFiniteGradientError, match="p2") as raised:
        optimizer.step(grads=gradients[1])
    assert raised.value.parameter == "p2"
    assert torch.equal(optimizer.area.memory, state)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, parameters, strict=True))
    gradients[1][2][17] = 0.0
    optimizer.step(grads=gradients[1])
    assert optimizer.step_count == 2


def check_streaming_is_burst(device: str, dtype: torch.dtype = torch.bfloat16, steps: int = 6, **more) -> None:
    """Whatever the order in which the gradients come, and over a redraw of projections."""
    weights = mixed_weights()
    gradients = [[g.to(dtype) for g in step] for step in given_gradients([tuple(w.shape) for w in weights], steps)]
    options = {"lr": 1e-3, "projection_gap": steps - 2, "weight_decay": 0.01} | more
    burst = run(weights, gradients, device, **options)
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini(parameters, **options)
    for t, step in enumerate(gradients):
        optimizer.begin()
        for i in sorted(range(len(weights)), key=lambda i: (i * 7 + t) % 5):
            optimizer.update(parameters[i], step[i].to(device))
        optimizer.finish()
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(burst, parameters, strict=True))


def test_streaming_is_burst() -> None:
    check_streaming_is_burst(CPU)


def check_hooks_are_burst(device: str, **options) -> None:
    """`with optimizer.streaming(): loss.backward()` frees every gradient and gives what `step()` gives."""

    def model() -> torch.nn.Module:
        torch.manual_seed(4)
        return torch.nn.Sequential(
            torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8), torch.nn.LayerNorm(8)
        ).to(device, torch.bfloat16)

    one, two = model(), model()
    burst, streamed = (ApolloMini(m.named_parameters(), lr=1e-2, **options) for m in (one, two))
    for seed, bucket_bytes in enumerate([1 << 28, 0, 700]):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        one(x).float().square().sum().backward()
        burst.step()
        burst.zero_grad()
        with streamed.streaming(bucket_bytes):
            two(x).float().square().sum().backward()
        assert all(p.grad is None for p in two.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert burst.step_count == streamed.step_count == 3


def test_hooks_are_burst() -> None:
    check_hooks_are_burst(CPU)


def check_update_rms(device: str, **options) -> None:
    weights = start_weights([(64, 32), (20,)])
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini(parameters, lr=1e-3, **options)
    optimizer.step(grads=[g.to(device) for g in given_gradients([(64, 32), (20,)], 1)[0]])
    moved = torch.cat([(p.detach().cpu() - w).flatten() for p, w in zip(parameters, weights, strict=True)])
    start = torch.cat([w.flatten() for w in weights])
    assert math.isclose(optimizer.last_update.update_rms, float(moved.square().mean().sqrt()), rel_tol=1e-4)
    assert math.isclose(optimizer.last_update.weight_rms, float(start.square().mean().sqrt()), rel_tol=1e-5)


def test_update_rms() -> None:
    check_update_rms(CPU)


def check_step_scale(device: str, most_before: int = 2, **options) -> None:
    """It multiplies the step and nothing else: from weights of zero the step is the weights, and half of it exact.

    most_before: steps at full length that come before it.
    """
    shapes = [(64, 32), (24, 48), (20,), (6, 1, 4)]
    gradients = given_gradients(shapes, 3)

    def taught(*scales: float, front: bool = False) -> tuple[list[Tensor], Tensor, float]:
        """All steps but the last at full length; what the last one moved, the state, and its RMS."""
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        optimizer = ApolloMini(parameters, lr=1e-3, scale_front=front, **options)
        for scale, step in zip(scales, gradients, strict=False):
            with torch.no_grad():
                for parameter in parameters:
                    parameter.zero_()
            optimizer.step(grads=[g.to(device) for g in step], step_scale=scale)
        moved = [p.detach().cpu() for p in parameters]
        return moved, optimizer.area.memory.clone(), optimizer.last_update.update_rms

    for front in (False, True):
        for before in ((1.0,) * count for count in range(most_before + 1)):
            whole, memory, rms = taught(*before, 1.0, front=front)
            half, half_memory, half_rms = taught(*before, 0.5, front=front)
            assert all(w.abs().min() > 0 and torch.equal(h, w / 2) for h, w in zip(half, whole, strict=True))
            assert torch.equal(memory, half_memory), "moments and the limiter see the gradient alone"
            assert math.isclose(half_rms, rms / 2, rel_tol=1e-6)
            tiny, _, tiny_rms = taught(*before, 1e-6, front=front)
            assert all(torch.allclose(t, w * 1e-6, rtol=1e-5, atol=0) for t, w in zip(tiny, whole, strict=True))
            assert math.isclose(tiny_rms, rms * 1e-6, rel_tol=1e-5)
            assert not any(w.any() for w in taught(*before, 0.0, front=front)[0])
        # A short step before does not shorten the next one.
        assert all(torch.equal(a, b) for a, b in zip(taught(1e-6, 1.0)[0], taught(1.0, 1.0)[0], strict=True))


def check_step_scale_in_every_way(device: str, **more) -> None:
    """Burst, streaming and hooks agree bit for bit, weight decay and stochastic rounding included."""

    def model() -> torch.nn.Module:
        torch.manual_seed(4)
        layers = torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8), torch.nn.LayerNorm(8)
        return torch.nn.Sequential(*layers).to(device, torch.bfloat16)

    models = [model() for _ in range(4)]
    options = {"lr": 1e-2, "weight_decay": 0.1} | more
    burst, pieces, hooks, unscaled = (ApolloMini(m.named_parameters(), **options) for m in models)
    for seed, scale in enumerate([0.5, 1.0, 0.125]):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        for one in (models[0], models[1], models[3]):
            one.zero_grad()
            one(x).float().square().sum().backward()
        burst.step(step_scale=scale)
        pieces.begin(scale)
        for parameter in reversed(list(models[1].parameters())):
            pieces.update(parameter)
        pieces.finish()
        with hooks.streaming(700, step_scale=scale):
            models[2](x).float().square().sum().backward()
        unscaled.step()
    for ours, *others in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, others[0]) and torch.equal(ours, others[1]) and not torch.equal(ours, others[2])


def test_step_scale() -> None:
    check_step_scale(CPU)


def test_step_scale_in_every_way() -> None:
    check_step_scale_in_every_way(CPU)


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_a_step_scale_that_makes_no_sense_is_refused_before_anything_changes(scale: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = ApolloMini([("w", parameter)], lr=1e-3)
    before = optimizer.area.memory.clone()
    with pytest.raises(ApolloError, match="step_scale"):
        optimizer.step(grads=[torch.ones(8, 8)], step_scale=scale)
    with pytest.raises(ApolloError, match="step_scale"), optimizer.streaming(step_scale=scale):
        raise AssertionError("the block must not be entered")
    assert torch.equal(parameter.detach(), torch.ones(8, 8)) and torch.equal(before, optimizer.area.memory)
    optimizer.step(grads=[torch.ones(8, 8)])
    assert optimizer.step_count == 1


def test_what_it_refuses_names_the_parameter() -> None:
    with pytest.raises(ApolloError, match=r"layer\.weight is torch\.float64"):
        ApolloMini([("layer.weight", torch.zeros(2, 2, dtype=torch.float64))], lr=1e-3)
    with pytest.raises(ApolloError, match=r"layer\.weight has strides"):
        ApolloMini([("layer.weight", torch.zeros(4, 3).T)], lr=1e-3)
    optimizer = ApolloMini([("layer.weight", torch.nn.Parameter(torch.zeros(3, 4)))], lr=1e-3)
    with pytest.raises(ApolloError, match=r"the gradient of layer\.weight"):
        optimizer.step(grads=[torch.zeros(4, 3)])
    with pytest.raises(ApolloError, match="later"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
