"""The factored rule against a float64 transcription, against the bench's rule, and its promises, on a CPU.

The checks take a device, so that test_factored_gpu.py runs the same ones on CUDA.
"""

import math
import sys
from pathlib import Path

import apollo_checks
import pytest
import step_checks
import test_apollo_state as state
import torch
from test_compiled_write import bits
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, NonFiniteGradientError, compiled_write, cpu, state_bytes
from worker.apollo.compiled_write import write_all

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from update_rules import Adam, RuleOptimizer

CPU = "cpu"
RULE = {"matrices": "factored"}
STEPS = 9


def oracle(weight: Tensor, gradients: list[Tensor], *, lr, decay, eps=1e-8) -> tuple[Tensor, list[float]]:
    """Adafactor's second moment (arXiv 1804.04235, algorithm 4) with AdamW's b2, in float64: W, and each |U|'s RMS
    before it was shortened."""
    w, r, c, sizes = weight.double(), 0.0, 0.0, []
    for t, g in enumerate((g.double() for g in gradients), start=1):
        r, c = 0.999 * r + 0.001 * (g**2).mean(1), 0.999 * c + 0.001 * (g**2).mean(0)
        rows, cols = r / (1 - 0.999**t), c / (1 - 0.999**t)
        u = g * rows.mean().sqrt() / torch.outer(rows.sqrt() + eps, cols.sqrt().clamp_min(eps))
        sizes.append(float(u.square().mean().sqrt()))
        w = w - lr * u / max(1.0, sizes[-1])
        w = w * (1 - lr * decay)
    return w, sizes


def given_gradients(shapes: list[tuple[int, ...]], steps: int) -> list[list[Tensor]]:
    """As apollo_checks', but that a matrix's rows and columns differ in size, and a few rows are nearly nothing."""
    scales = [
        [10 ** torch.linspace(-1, 1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(n))] for n in shape]
        for shape in shapes
    ]
    found = apollo_checks.given_gradients(shapes, steps)
    for step in found:
        for g, sizes in zip(step, scales, strict=True):
            if g.dim() == 2:
                g.mul_(sizes[0][:, None]).mul_(sizes[1])
                g[3::50] *= 1e-7
    return found


def check_golden(
    device: str, decay: float, shapes: list[tuple[int, ...]] = apollo_checks.SHAPES, steps: int = STEPS
) -> None:
    weights, gradients = apollo_checks.start_weights(shapes), given_gradients(shapes, steps)
    ours = apollo_checks.run(weights, gradients, device, lr=1e-2, weight_decay=decay, **RULE)
    errors, sizes = {}, []
    for i, shape in enumerate(shapes):
        wanted, lengths = oracle(weights[i], [step[i] for step in gradients], lr=1e-2, decay=decay)
        errors[shape] = apollo_checks.relative(ours[i], wanted, weights[i])
        sizes += lengths
    assert max(errors.values()) < 2e-6, errors
    assert min(sizes) < 0.9 and max(sizes) > 1.1, "some steps are shortened, and some are not"


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_follows_float64(decay: float) -> None:
    check_golden(CPU, decay)


def test_is_the_rule_that_the_bench_measured() -> None:
    """benchmarks/update_rules.py, plain torch in fp32, over steps of different sizes; small tensors take AdamW in
    both."""
    shapes: list[tuple[int, ...]] = [(60, 40), (40, 60), (33,)]
    weights = apollo_checks.start_weights(shapes)
    gradients = [[100 * g for g in step] for step in apollo_checks.given_gradients(shapes, STEPS)]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    rule = Adam(beta1=0, second="factored")
    bench = RuleOptimizer([(str(i), p) for i, p in enumerate(theirs)], rule, seed=0)
    for step in gradients:
        for parameter, gradient in zip(theirs, step, strict=True):
            parameter.grad = gradient.clone()
        bench.step(1e-2)
    ours = apollo_checks.run(weights, gradients, lr=1e-2, **RULE)
    for mine, its, start in zip(ours, theirs, weights, strict=True):
        assert apollo_checks.relative(mine, its.detach().double(), start) < 5e-6


def test_a_row_without_a_gradient_stays() -> None:
    weights, gradients = apollo_checks.start_weights([(8, 6)]), apollo_checks.given_gradients([(8, 6)], 3)
    for step in gradients:
        step[0][5] = 0
        step[0][:, 2] = 0
    after = apollo_checks.run(weights, gradients, lr=1e-2, **RULE)[0]
    still = after == weights[0]
    assert still[5].all() and still[:, 2].all() and still.sum() == 8 + 6 - 1


def test_a_heavy_tail_does_not_lengthen_the_step() -> None:
    gradient = torch.full((64, 64), 1e-4)
    gradient.diagonal().fill_(1.0)  # U's RMS would be 8
    moved = apollo_checks.run([torch.zeros(64, 64)], [[gradient]], lr=1e-3, **RULE)[0]
    assert math.isclose(float(moved.square().mean().sqrt()), 1e-3, rel_tol=1e-5)


def test_bitwise_repeatable() -> None:
    apollo_checks.check_repeatable(CPU, **RULE)


def test_nearest_is_the_rounded_fp32_result() -> None:
    apollo_checks.check_nearest_is_the_rounded_fp32_result(CPU, **RULE)


def test_stochastic_takes_a_neighbour_without_bias() -> None:
    apollo_checks.check_stochastic_takes_a_neighbour_without_bias(CPU, **RULE)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_row_slices(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "COMPILED_FROM", 0 if is_compiled else 1 << 60)
    apollo_checks.check_row_slices(CPU, **RULE)


def test_zero_gradient_is_harmless() -> None:
    apollo_checks.check_zero_gradient_is_harmless(CPU, **RULE)


def test_every_way_is_a_burst() -> None:
    step_checks.check_streaming_is_burst(CPU, **RULE)
    step_checks.check_hooks_are_burst(CPU, **RULE)
    step_checks.check_step_scale_in_every_way(CPU, **RULE)


def test_step_scale() -> None:
    step_checks.check_step_scale(CPU, **RULE)


def test_update_rms() -> None:
    apollo_checks.check_update_rms(CPU, **RULE)


def test_resumes(tmp_path: Path) -> None:
    state.check_resumes_in_place(CPU, **RULE)
    state.check_resumes_from_a_file(CPU, tmp_path, **RULE)


def test_a_non_finite_gradient_changes_nothing_and_is_named() -> None:
    parameters = [(name, torch.nn.Parameter(torch.ones(8, 6))) for name in ("a", "b")]
    optimizer = ApolloMini(parameters, lr=1e-3, **RULE)
    optimizer.step(grads=[torch.ones(8, 6)] * 2)
    before, memory = [p.detach().clone() for _, p in parameters], optimizer.area.memory.clone()
    bad = torch.ones(8, 6)
    bad[7, 5] = math.inf
    with pytest.raises(NonFiniteGradientError, match="b"):
        optimizer.step(grads=[torch.ones(8, 6), bad])
    assert torch.equal(optimizer.area.memory, memory)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, parameters, strict=True))


def train(decay: float) -> tuple[list[Tensor], Tensor, list[float]]:
    """Weights, state and sums after four steps of odd shapes, bf16 gradients and fp32 ones."""
    shapes = [(33, 33), (130, 71), (70, 136), (1, 7), (300, 1), (8, 2500)]
    weights = [*apollo_checks.mixed_weights(), *(w.bfloat16() for w in apollo_checks.start_weights(shapes))]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = ApolloMini(parameters, lr=1e-2, weight_decay=decay, seed=2**63 + 5, **RULE)
    sums = []
    for step, gradients in enumerate(given_gradients([tuple(w.shape) for w in weights], 4)):
        optimizer.step(grads=[g if step % 2 else g.bfloat16() for g in gradients], step_scale=0.5 + step / 10)
        sums += [optimizer.last_update.update_rms, optimizer.last_update.weight_rms]
    return [p.detach() for p in parameters], optimizer.area.memory, sums


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_compiled_step_is_torchs(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, memory, sums = train(decay)
    asked = []
    monkeypatch.setattr(cpu, "COMPILED_FROM", 0)
    monkeypatch.setattr(compiled_write, "PIECE", 1000)
    monkeypatch.setattr(compiled_write, "write_all", lambda writes, k: (asked.extend(writes), write_all(writes, k)))
    compiled_weights, compiled_memory, compiled_sums = train(decay)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, compiled_weights, strict=True))
    assert torch.equal(memory, compiled_memory) and sums == compiled_sums
    assert sum(write.scales is not None for write in asked) == 4 * 8


def test_state_bytes_and_another_rule_s_state() -> None:
    assert state_bytes([(17408, 5120)], **RULE) == 128 + 4 * (17408 + 5120)
    assert state_bytes([(17408, 5120), (64, 1, 4)], **RULE) == 128 + 4 * (17408 + 5120) + 2 * 4 * 256
    memory = torch.zeros(state_bytes([(64, 64)]), dtype=torch.uint8)
    ApolloMini([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-3, state=memory)
    with pytest.raises(ApolloError, match="algorithms"):
        ApolloMini([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-3, state=memory, **RULE)
    with pytest.raises(ValueError, match="factored"):
        ApolloMini([torch.nn.Parameter(torch.ones(64, 64))], lr=1e-3, matrices="columns")
