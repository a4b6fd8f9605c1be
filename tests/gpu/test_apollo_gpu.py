"""The Triton kernels: the CPU's checks again on CUDA, and what only a device can show.

With TRITON_INTERPRET=1 the kernels run on the CPU, element by element: test_apollo_interpreted.py does that where there
is no GPU, with the checks that do not take too long.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import apollo_checks
import pytest
import step_checks
import test_apollo_random as random
import test_apollo_state as state
import torch
from torch import Tensor

from worker.apollo import ApolloMini, NonFiniteGradientError, philox

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
rounding = pytest.importorskip("worker.apollo.kernels.rounding")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and this machine has none"),
]  # fmt: skip
device_only = pytest.mark.skipif(INTERPRETED, reason="needs a real device")
bf16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted, the CUDA implementation has to be asked for: the parameters are on the CPU."""
    if INTERPRETED:
        from worker.apollo.cuda import CudaBackend

        monkeypatch.setattr(
            ApolloMini, "_make_backend", lambda self, device: CudaBackend(self._slots, self.area, self._options)
        )
    yield


@device_only
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_follows_float64_over_redraws(front: bool, decay: float) -> None:
    apollo_checks.check_golden(DEVICE, front, decay)


def test_adamw_follows_float64() -> None:
    apollo_checks.check_adamw(DEVICE)


@device_only
def test_follows_the_cpu_implementation() -> None:
    """fp32 to 2e-6 of the total update, with projections of its own; bf16 nearly everywhere bit for bit."""
    shapes = [*apollo_checks.SHAPES, (9,), (16, 1, 4)]
    weights, gradients = apollo_checks.start_weights(shapes), apollo_checks.given_gradients(shapes, 12)
    options = {"lr": 1e-3, "projection_gap": 5, "seed": 3}
    cpu, gpu = (apollo_checks.run(weights, gradients, device, **options) for device in ("cpu", DEVICE))
    for ours, theirs, start in zip(gpu, cpu, weights, strict=True):
        assert apollo_checks.relative(ours, theirs.double(), start) < 2e-6
    weights = [w.bfloat16() for w in weights]
    cpu, gpu = (apollo_checks.run(weights, gradients[:1], device, **options) for device in ("cpu", DEVICE))
    for ours, theirs in zip(gpu, cpu, strict=True):
        step = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
        assert step.max() <= 1
        assert (step > 0).float().mean() < 2e-3 or step.sum() <= 1


@device_only
def test_bitwise_repeatable() -> None:
    apollo_checks.check_repeatable(DEVICE)


@device_only  # the interpreter cuts where the device rounds
def test_nearest_is_the_rounded_fp32_result() -> None:
    apollo_checks.check_nearest_is_the_rounded_fp32_result(DEVICE)


def test_stochastic_takes_a_neighbour_without_bias() -> None:
    apollo_checks.check_stochastic_takes_a_neighbour_without_bias(DEVICE, 8 if INTERPRETED else 64)


def test_row_slices() -> None:
    apollo_checks.check_row_slices(DEVICE)


def test_zero_gradient_is_harmless() -> None:
    apollo_checks.check_zero_gradient_is_harmless(DEVICE)


@pytest.mark.parametrize("dtype", [bf16, pytest.param(torch.float32, marks=device_only)])
def test_streaming_is_burst(dtype: torch.dtype) -> None:
    step_checks.check_streaming_is_burst(DEVICE, dtype, steps=3 if INTERPRETED else 6)


def test_hooks_are_burst() -> None:
    step_checks.check_hooks_are_burst(DEVICE)


def test_step_scale() -> None:
    step_checks.check_step_scale(DEVICE, most_before=0 if INTERPRETED else 2)


def test_step_scale_in_every_way() -> None:
    step_checks.check_step_scale_in_every_way(DEVICE)


def test_update_rms() -> None:
    apollo_checks.check_update_rms(DEVICE)


@device_only
def test_shards() -> None:
    random.check_shards(DEVICE)


@device_only
def test_resumes_in_place() -> None:
    state.check_resumes_in_place(DEVICE)


@device_only
def test_resumes_from_a_file(tmp_path: Path) -> None:
    state.check_resumes_from_a_file(DEVICE, tmp_path)


@triton.jit
def both_ways(blocks, elements, step, id, key0, key1, first, R: tl.constexpr, C: tl.constexpr):
    """Rounding bits of R rows of C elements from `first`: by whole Philox blocks, and element by element."""
    row, col = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    start = first + row.to(tl.int64) * C
    key0, key1, step, id = key0.to(tl.uint32), key1.to(tl.uint32), step.to(tl.uint32), id.to(tl.uint32)
    eighths = (start >> 3) + tl.arange(0, C // 8)[None, :]
    tl.store(blocks + row * C + col, rounding.bits_of_blocks(eighths, step, id, key0, key1, R, C).to(tl.int32))
    tl.store(elements + row * C + col, rounding.bits_of_elements(start + col, step, id, key0, key1).to(tl.int32))


@pytest.mark.parametrize("first", [0, 8 * 12345, 2**35 - 64])
def test_rounding_bits_are_the_cpu_s(first: int) -> None:
    seed, step, id = 0xFEDCBA9876543210, 7, 850
    wanted = philox.rounding_bits(seed, step, id, torch.tensor([first]), 16 * 64).view(16, 64)
    got = [torch.zeros(16, 64, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    both_ways[(1,)](*got, step, id, *philox.seed_words(seed), first, R=16, C=64)
    for bits in got:
        assert torch.equal(bits.cpu(), wanted)


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=device_only)])
def test_a_non_finite_gradient_changes_nothing_and_is_named(bad: float) -> None:
    weights = apollo_checks.mixed_weights()
    gradients = apollo_checks.given_gradients([tuple(w.shape) for w in weights], 3)
    clean = apollo_checks.run(weights, [gradients[0], gradients[2]], DEVICE, lr=1e-3)
    parameters = [(f"p{i}", torch.nn.Parameter(w.clone().to(DEVICE))) for i, w in enumerate(weights)]
    optimizer = ApolloMini(parameters, lr=1e-3)
    optimizer.step(grads=[g.to(DEVICE) for g in gradients[0]])
    before, memory = [p.detach().clone() for _, p in parameters], optimizer.area.memory.clone()
    for i in (4, 1):  # the later parameter is named only if it is the first bad one
        gradients[1][i].view(-1)[-3] = bad
    optimizer.step(grads=[g.to(DEVICE) for g in gradients[1]])
    assert torch.equal(optimizer.area.memory, memory)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, parameters, strict=True))
    with pytest.raises(NonFiniteGradientError, match="p1"):
        optimizer.check()
    assert optimizer.step_count == 1
    optimizer.step(grads=[g.to(DEVICE) for g in gradients[2]])
    optimizer.check()
    assert optimizer.step_count == 2
    assert all(torch.equal(a, p.detach().cpu()) for a, (_, p) in zip(clean, parameters, strict=True))


def test_a_refused_step_is_reported_by_its_numbers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, 8, device=DEVICE))
    optimizer = ApolloMini([("w", parameter)], lr=1e-3)
    optimizer.step(grads=[torch.full((8, 8), math.nan, device=DEVICE)])
    with pytest.raises(NonFiniteGradientError, match="w"):
        _ = optimizer.last_update.update_rms
    assert optimizer.step_count == 0
    optimizer.step(grads=[torch.full((8, 8), math.nan, device=DEVICE)])
    with pytest.raises(NonFiniteGradientError, match="w"):
        for _ in range(300):  # told at the latest by the redraw, without being asked
            optimizer.step(grads=[torch.ones(8, 8, device=DEVICE)])
    assert optimizer.step_count == int(optimizer.area.step_count) < 200


def test_gradients_that_start_anywhere() -> None:
    """A gradient at an odd address is copied, every step again; the result is that of an aligned one."""
    shapes = [(64, 64), (24, 48)]
    weights = [w.bfloat16() for w in apollo_checks.start_weights(shapes)]
    gradients = [[g.bfloat16() for g in step] for step in apollo_checks.given_gradients(shapes, 3)]
    parameters = [torch.nn.Parameter(w.clone().to(DEVICE)) for w in weights]
    buffers = [torch.zeros(w.numel() + 1, dtype=bf16, device=DEVICE) for w in weights]
    odd = [buffer[1:].view_as(w) for buffer, w in zip(buffers, weights, strict=True)]
    optimizer = ApolloMini(parameters, lr=1e-2)
    for step in gradients:
        for view, gradient in zip(odd, step, strict=True):
            view.copy_(gradient)
        optimizer.begin()
        optimizer.update_many(list(zip(parameters, odd, strict=True)))
        optimizer.update_many([])  # nothing, and not the last once more
        optimizer.finish()
    wanted = apollo_checks.run(weights, gradients, DEVICE, lr=1e-2)
    assert all(torch.equal(p.detach().cpu(), w) for p, w in zip(parameters, wanted, strict=True))


def large_case(count: int = 3) -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    """Tall, wide, small and one-row matrices of a few tiles each, and gradients for some steps."""
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(bf16)

    shapes = [(1536, 640), (640, 1536), (48, 1024), (1000, 333), (333, 1000), (1, 2048), (4096,), (512, 1, 4)]
    return [torch.nn.Parameter(normal(*s)) for s in shapes], [[normal(*s) for s in shapes] for _ in range(count)]


@device_only  # it would take minutes
def test_tiling_of_the_second_pass_changes_nothing() -> None:
    from worker.apollo.cuda import CudaBackend
    from worker.apollo.launch_tables import Tiling

    results = []
    for tiling in (Tiling(), Tiling(out=(32, 4, 128), out_warps=2), Tiling(out=(128, 32, 256), out_warps=8)):
        parameters, gradients = large_case(1)
        optimizer = ApolloMini(parameters, lr=1e-2)
        optimizer._steps.backend = CudaBackend(optimizer._slots, optimizer.area, optimizer._options, tiling)
        optimizer.step(grads=gradients[0])
        results.append([p.detach().cpu() for p in parameters])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@device_only
def test_a_captured_step_is_a_step() -> None:
    results = []
    for captured in (False, True):
        parameters, gradients = large_case(5)
        optimizer = ApolloMini(parameters, lr=1e-2, projection_gap=3)
        for p, g in zip(parameters, gradients[0], strict=True):
            p.grad = g.clone()
        optimizer.step()
        step = optimizer.capture() if captured else optimizer.step
        for t, more in enumerate(gradients[1:]):
            for p, g in zip(parameters, more, strict=True):
                p.grad.copy_(g)
            optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
            if not captured:
                optimizer.prepare()
            step(step_scale=1 / (t + 1))
        assert optimizer.step_count == 5
        results.append([*(p.detach().clone() for p in parameters), optimizer.area.memory.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@device_only
def test_the_steady_state_neither_waits_nor_allocates() -> None:
    parameters, gradients = large_case(1)
    optimizer = ApolloMini(parameters, lr=1e-2)
    for _ in range(2):
        optimizer.step(grads=gradients[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(5):
            optimizer.param_groups[0]["lr"] = 1e-3 * t
            optimizer.step(grads=gradients[0])
        optimizer.begin()
        for parameter, gradient in zip(parameters, gradients[0], strict=True):
            optimizer.update(parameter, gradient)
        optimizer.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()
    assert optimizer.step_count == int(optimizer.area.step_count) == 8


@device_only
def test_offsets_beyond_32_bits() -> None:
    """2.2e9 elements: the last rows move by the same factor of their gradient as the first."""
    rows, cols = 430_000, 5120
    weight = torch.zeros(rows, cols, dtype=bf16, device=DEVICE)
    gradient = torch.zeros(rows, cols, dtype=bf16, device=DEVICE)
    pattern = torch.randn(64, cols, generator=torch.Generator().manual_seed(0)).to(DEVICE, bf16)
    gradient[:64], gradient[-64:] = pattern, pattern
    optimizer = ApolloMini([torch.nn.Parameter(weight)], lr=1.0, rounding="nearest")
    optimizer.step(grads=[gradient])
    assert weight[:64].abs().sum() > 0
    assert torch.equal(weight[:64], weight[-64:])
    assert not weight[64:-64].any()
