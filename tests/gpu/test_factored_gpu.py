"""The factored rule's kernels: the CPU's checks again on CUDA, by whole rows and by tiles, and a device's own.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import apollo_checks
import pytest
import step_checks
import test_apollo_state as state
import test_factored as factored
import torch
from test_apollo_gpu import DEVICE, INTERPRETED, device_only, large_case, pytestmark  # noqa: F401
from test_factored import RULE
from torch import Tensor

from worker.apollo import ApolloMini, NonFiniteGradientError

cuda = pytest.importorskip("worker.apollo.cuda")
launch_tables = pytest.importorskip("worker.apollo.launch_tables")

WAYS = {
    "rows": launch_tables.Tiling(),
    "rows in windows": launch_tables.Tiling(strip=(16, 2), window=1 << 12),
    "tiles": launch_tables.Tiling(strip_most=0, wide=(64, 16, 64), window=1 << 10),
}


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every check with every way of summing."""
    monkeypatch.setattr(
        ApolloMini,
        "_make_backend",
        lambda self, device: cuda.CudaBackend(self._slots, self.area, self._options, WAYS[request.param]),
    )
    yield request.param


def test_follows_float64() -> None:
    shapes = [(33, 33), (50, 70), (24, 136)] if INTERPRETED else [*apollo_checks.SHAPES, (300, 3000), (40, 9000)]
    factored.check_golden(DEVICE, 0.01, shapes, steps=4 if INTERPRETED else factored.STEPS)


@device_only  # it would take a minute
def test_streaming_is_burst() -> None:
    step_checks.check_streaming_is_burst(DEVICE, torch.bfloat16, **RULE)


@device_only
def test_row_slices() -> None:
    apollo_checks.check_row_slices(DEVICE, **RULE)


@device_only
def test_zero_gradient_is_harmless() -> None:
    apollo_checks.check_zero_gradient_is_harmless(DEVICE, **RULE)


@device_only
def test_update_rms() -> None:
    apollo_checks.check_update_rms(DEVICE, **RULE)


@device_only
def test_every_promise() -> None:
    step_checks.check_hooks_are_burst(DEVICE, **RULE)
    step_checks.check_step_scale(DEVICE, most_before=0 if INTERPRETED else 2, **RULE)
    step_checks.check_step_scale_in_every_way(DEVICE, **RULE)
    apollo_checks.check_nearest_is_the_rounded_fp32_result(DEVICE, **RULE)
    apollo_checks.check_stochastic_takes_a_neighbour_without_bias(DEVICE, **RULE)


@device_only
def test_resumes(tmp_path: Path) -> None:
    state.check_resumes_in_place(DEVICE, **RULE)
    state.check_resumes_from_a_file(DEVICE, tmp_path, **RULE)


def test_a_non_finite_gradient_changes_nothing_and_is_named() -> None:
    weights = apollo_checks.mixed_weights()
    gradients = apollo_checks.given_gradients([tuple(w.shape) for w in weights], 2)
    parameters = [(f"p{i}", torch.nn.Parameter(w.clone().to(DEVICE))) for i, w in enumerate(weights)]
    optimizer = ApolloMini(parameters, lr=1e-3, **RULE)
    optimizer.step(grads=[g.to(DEVICE) for g in gradients[0]])
    before, memory = [p.detach().clone() for _, p in parameters], optimizer.area.memory.clone()
    for i in (4, 1):
        gradients[1][i].view(-1)[-3] = math.nan
    optimizer.step(grads=[g.to(DEVICE) for g in gradients[1]])
    assert torch.equal(optimizer.area.memory, memory)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, parameters, strict=True))
    with pytest.raises(NonFiniteGradientError, match="p1"):
        optimizer.check()


@device_only
def test_follows_the_cpu_implementation() -> None:
    """fp32 to 2e-6 of the total update; bf16 nearly everywhere bit for bit."""
    shapes: list[tuple[int, ...]] = [*apollo_checks.SHAPES, (9,), (16, 1, 4), (48, 9000)]
    weights, gradients = apollo_checks.start_weights(shapes), apollo_checks.given_gradients(shapes, 6)

    def both(starts: list[Tensor], steps: list[list[Tensor]]) -> list[list[Tensor]]:
        gpu = apollo_checks.run(starts, steps, DEVICE, lr=1e-3, seed=3, **RULE)
        with pytest.MonkeyPatch.context() as patch:
            patch.undo()
            patch.setattr(ApolloMini, "_make_backend", lambda self, device: _cpu(self))
            return [gpu, apollo_checks.run(starts, steps, "cpu", lr=1e-3, seed=3, **RULE)]

    for ours, theirs, start in zip(*both(weights, gradients), weights, strict=True):
        assert apollo_checks.relative(ours, theirs.double(), start) < 2e-6
    for ours, theirs in zip(*both([w.bfloat16() for w in weights], gradients[:1]), strict=True):
        step = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        assert step.max() <= 1
        assert (step > 0).float().mean() < 2e-3 or step.sum() <= 1


def _cpu(optimizer: ApolloMini) -> object:
    from worker.apollo.cpu import CpuBackend

    return CpuBackend(optimizer._slots, optimizer.area, optimizer._options)


@device_only
def test_bitwise_repeatable_and_resumed_in_large() -> None:
    """Matrices of many tiles: the same bits again, whichever others are in the launch."""
    results = []
    for alone in (False, False, True):
        parameters, gradients = large_case(3)
        optimizer = ApolloMini(parameters, lr=1e-2, **RULE)
        for step in gradients:
            optimizer.begin()
            pairs = list(zip(parameters, step, strict=True))
            for some in [[pair] for pair in pairs] if alone else [pairs]:
                optimizer.update_many(some)
            optimizer.finish()
        results.append([*(p.detach().clone() for p in parameters), optimizer.area.memory.clone()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@device_only
def test_a_captured_step_is_a_step() -> None:
    results = []
    for captured in (False, True):
        parameters, gradients = large_case(4)
        optimizer = ApolloMini(parameters, lr=1e-2, **RULE)
        for p, g in zip(parameters, gradients[0], strict=True):
            p.grad = g.clone()
        optimizer.step()
        step = optimizer.capture() if captured else optimizer.step
        for t, more in enumerate(gradients[1:]):
            for p, g in zip(parameters, more, strict=True):
                p.grad.copy_(g)
            if not captured:
                optimizer.prepare()
            step(step_scale=1 / (t + 1))
        results.append([*(p.detach().clone() for p in parameters), optimizer.area.memory.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@device_only
def test_the_steady_state_neither_waits_nor_allocates() -> None:
    parameters, gradients = large_case(1)
    optimizer = ApolloMini(parameters, lr=1e-2, **RULE)
    for _ in range(2):
        optimizer.step(grads=gradients[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step(grads=gradients[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@device_only
def test_both_ways_of_summing_agree(way: str) -> None:
    """fp32, over matrices of many tiles. Their sums have another order, so factors differ in their last bits, and a few
    weights round to the other neighbour: neighbours of 1 are 1e-4 of such an update apart (2.2e-6 in all was seen)."""
    parameters, gradients = large_case(2)
    weights = [p.detach().float().cpu() for p in parameters]
    ours = apollo_checks.run(weights, gradients, DEVICE, lr=1e-3, **RULE)
    other = replace(WAYS[way], strip_most=0 if WAYS[way].strip_most else 8192)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ApolloMini,
            "_make_backend",
            lambda self, device: cuda.CudaBackend(self._slots, self.area, self._options, other),
        )
        theirs = apollo_checks.run(weights, gradients, DEVICE, lr=1e-3, **RULE)
    for a, b, start in zip(ours, theirs, weights, strict=True):
        assert apollo_checks.relative(a, b.double(), start) < 1e-5
