"""The compiled write of a CPU's sweep against torch's, which is its definition: bit for bit, whatever the shapes."""

import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
import torch
from apollo_checks import check_row_slices, given_gradients, mixed_weights, start_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, compiled_write, cpu, cpu_kernel, formulas, philox
from worker.apollo.compiled_write import Kernel, Write, write_all

ROOT = Path(__file__).parents[3]
SPECIAL = [0x7FC0, 0xFFC1, 0x7FA5, 0xFF80, 0x7F80, 0x7F7F, 0xFF7F, 0x8000, 0x0000, 0x0001, 0x807F, 0x0080]
"""bf16 by its bits: NaNs quiet and signalling, infinities, the largest, zeros, denormals, the smallest normal one."""


@pytest.fixture(autouse=True)
def threads_are_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are written by compiled code too."""
    monkeypatch.setattr(cpu, "COMPILED_FROM", 0)


def kernel() -> Kernel:
    found = compiled_write.load()
    assert found is not None
    return found


def bits(tensor: Tensor) -> Tensor:
    """To compare with: a NaN equals itself, and -0 is not 0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 1: torch.uint8}[tensor.element_size()])


def written_by_torch(write: Write) -> Tensor:
    rows, cols = write.weight.shape
    value = formulas.apply(write.weight.float(), write.direction.float(), write.step, write.decay)
    first = write.first + torch.arange(rows) * write.pitch
    return philox.round_stochastic(value, philox.rounding_bits(write.seed, write.t, write.id, first, cols))


def matrix(rows: int, cols: int, gap: int, offset: int, scale: float, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, cols] inside a larger memory, rows `gap` elements apart, with one special value in eleven."""
    generator = torch.Generator().manual_seed(seed)
    count = offset + rows * (cols + gap)
    values = scale * torch.randn(count, generator=generator) * 10 ** (4 * torch.randn(count, generator=generator))
    chosen = torch.randint(0, 11 * len(SPECIAL), (count,), generator=generator)
    specials = torch.tensor(SPECIAL, dtype=torch.int32)[chosen % len(SPECIAL)].to(torch.int16).view(torch.bfloat16)
    memory = torch.where(chosen < len(SPECIAL), specials, values.to(dtype))
    return memory[offset:].view(rows, cols + gap)[:, :cols]


def case(draw: random.Random) -> Write:
    """Any matrices, places, numbers and draws; each kind of neighbourhood about as often as the others."""
    rows, cols = draw.randint(1, 12), draw.choice([draw.randint(1, 40), 63, 64, 576, 2047, 2048, 2049, 4100])
    gaps = [draw.choice([0, 0, 8, draw.randint(1, 9)]) for _ in range(2)]
    offsets = [draw.choice([0, 8, draw.randint(1, 9)]) for _ in range(2)]
    left, right = draw.choice([(0, 0), (0, 3), (draw.randint(0, 20), draw.randint(0, 20))])
    step, decay = (draw.choice([0.0, 1e-50, 1e-44, 1.0, 10 ** draw.uniform(-12, 3), -draw.random()]) for _ in range(2))
    dtype = draw.choice([torch.float32, torch.bfloat16])
    weight = matrix(rows, cols, gaps[0], offsets[0], 0.02, torch.bfloat16, draw.getrandbits(32))
    direction = matrix(rows, cols, gaps[1], offsets[1], 1e-3, dtype, draw.getrandbits(32))
    if dtype == torch.float32 and step:  # weights brought to nearly nothing: a second rounding would show
        direction[::2] = weight[::2].float() / step
    direction.nan_to_num_()  # a gradient that is not finite is refused before
    pitch = left + cols + right
    first = draw.choice([0, draw.getrandbits(10), draw.getrandbits(38) // pitch]) * pitch + left
    t, id = (draw.choice([1, draw.getrandbits(10), draw.getrandbits(40)]) for _ in range(2))
    return Write(weight, direction, step, decay, draw.getrandbits(64), t, id, first, pitch)


@given(st.integers(0, 2**64 - 1))
def test_every_bit_is_torchs(seed: int) -> None:
    draw = random.Random(seed)
    write = case(draw)
    weight, cols = write.weight, write.weight.shape[1]
    assert weight._base is not None
    wanted, around = written_by_torch(write), weight._base.clone()
    around.as_strided(weight.shape, weight.stride(), weight.storage_offset()).copy_(wanted)
    torch.set_num_threads(draw.randint(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_write, "PIECE", draw.choice([1, 3 * cols + 1, 1 << 18]))
        write_all([write], kernel())
    assert torch.equal(bits(weight), bits(wanted))
    assert torch.equal(bits(weight._base), bits(around)), "written beside the matrix"


def train(scale_front: bool, decay: float, rounding: str, frozen: bool) -> tuple[list[Tensor], Tensor, list[float]]:
    """Weights, state and sums after seven steps of odd shapes, with redraws, an empty gradient and a bucket."""
    shapes = [(33, 33), (130, 71), (70, 136), (1, 7), (300, 1), (8, 1025)]
    weights = [*mixed_weights(), *(w.bfloat16() for w in start_weights(shapes))]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    options = {"lr": 1e-2, "projection_gap": 3, "weight_decay": decay, "scale_front": scale_front, "seed": 2**63 + 5}
    optimizer = ApolloMini(parameters, rounding=rounding, **options)
    sums = []
    for step, gradients in enumerate(given_gradients([tuple(w.shape) for w in weights], 7)):
        given: list[Tensor | None] = [g if step % 2 else g.bfloat16() for g in gradients]
        given[1] = torch.zeros_like(gradients[1]) if step == 4 else given[1]
        given[0] = None if frozen else given[0]
        if step < 5:
            optimizer.step(grads=given, step_scale=0.5 + step / 10)
        else:
            optimizer.begin(0.25)
            pairs = [(p, g) for p, g in zip(parameters, given, strict=True) if g is not None]
            optimizer.update_many(pairs[5:])
            optimizer.update_many(pairs[:5])
            optimizer.finish()
        sums += [optimizer.last_update.update_rms, optimizer.last_update.weight_rms]
    return [p.detach() for p in parameters], optimizer.area.memory, sums


@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(("rounding", "frozen"), [("stochastic", False), ("stochastic", True), ("nearest", False)])
def test_the_whole_step_is_torchs(
    scale_front: bool, decay: float, rounding: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, state, sums = train(scale_front, decay, rounding, frozen)
    asked = []
    monkeypatch.setattr(cpu, "COMPILED_FROM", 0)
    monkeypatch.setattr(compiled_write, "write_all", lambda writes, k: (asked.extend(writes), write_all(writes, k)))
    compiled_weights, compiled_state, compiled_sums = train(scale_front, decay, rounding, frozen)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, compiled_weights, strict=True))
    assert torch.equal(state, compiled_state)
    assert sums == compiled_sums
    # one of the eleven is fp32; the empty gradient is not written
    assert len(asked) == (0 if rounding == "nearest" else 7 * (10 - frozen) - 1)


def test_row_slices(compiled: None) -> None:
    check_row_slices("cpu")


def test_a_large_model_is_compiled_for_when_it_is_made_and_a_small_one_is_not() -> None:
    def chosen(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **options: str) -> bool:
        parameters = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        return ApolloMini(parameters, lr=1e-3, **options)._steps.backend._kernel is not None  # type: ignore[attr-defined]

    half = (2048, 4096)
    assert chosen(half, half)
    assert not chosen(half, (2048, 4095))
    assert not chosen(half, half, dtype=torch.float32)
    assert not chosen(half, half, rounding="nearest")


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_than_torch_has(threads: int) -> None:
    """Each piece is written once, by one of them, and none is left when the call is over."""
    at_work, pieces = set(), []
    meet = threading.Barrier(threads)

    def recorded(*call: object) -> None:
        if threading.get_ident() not in at_work:
            at_work.add(threading.get_ident())
            meet.wait(60)  # until all have taken one
        pieces.append(call[6])

    weight = torch.zeros(40, 64, dtype=torch.bfloat16)
    before = threading.active_count()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_write, "PIECE", 64)
        write_all([Write(weight, weight.clone(), 1.0, 0.0, 0, 1, 2, 0, 64)], recorded)
    assert len(at_work) == threads and threading.get_ident() in at_work
    assert sorted(pieces) == [64 * row for row in range(40)]  # type: ignore[type-var]
    assert threading.active_count() == before


def test_what_fails_in_a_thread_is_raised() -> None:
    elsewhere = threading.Event()

    def fails_elsewhere(*call: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            elsewhere.set()
            raise MemoryError("in a thread")
        assert elsewhere.wait(60)

    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError, match="in a thread"):
        patch.setattr(compiled_write, "PIECE", 64)
        write_all([Write(weight, weight.clone(), 1.0, 0.0, 0, 1, 2, 0, 64)], fails_elsewhere)


def test_a_step_beyond_fp32_is_refused_before_anything_is_written(compiled: None) -> None:
    parameters = [torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = ApolloMini([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1e60}], lr=1e-3)
    with pytest.raises(ApolloError, match="beyond fp32"):
        optimizer.step(grads=[torch.ones(8, 8)] * 2)
    assert all((parameter == 1).all() for parameter in parameters)


def test_without_numba_it_says_so_at_the_start(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "worker.apollo.cpu_kernel")
    monkeypatch.delattr("worker.apollo.cpu_kernel")
    monkeypatch.setattr(compiled_write, "load", compiled_write.load.__wrapped__)
    with pytest.raises(ApolloError, match=r"numba.* cannot be imported .*pip install"):
        ApolloMini([torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))], lr=1e-3)


def test_where_no_folder_takes_it_it_is_compiled_each_time_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")  # takes only what lies in an archive
    with caplog.at_level(logging.INFO, "tandem"):
        assert compiled_write._gives_torchs_bits(cpu_kernel.compiled())
    assert "cannot be kept" in caplog.text and "NUMBA_CACHE_DIR" in caplog.text


def test_where_torch_does_not_fuse_torch_writes_and_it_is_said() -> None:
    """torch as it is on a CPU without fused arithmetic: a process of its own, since torch decides when it is loaded."""
    code = """
import logging
import torch
from worker.apollo import ApolloMini, cpu
logging.basicConfig(format="%(levelname)s %(message)s")
cpu.COMPILED_FROM = 0
print(torch.backends.cpu.get_cpu_capability(),
      ApolloMini([torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))], lr=1e-3)._steps.backend._kernel)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ATEN_CPU_CAPABILITY": "default"}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if not done.stdout.startswith("DEFAULT"):
        pytest.skip(f"torch knows one kind of this CPU only: {done.stdout}")
    assert done.stdout.split() == ["DEFAULT", "None"]
    assert "WARNING the CPU's sweep is torch's" in done.stderr
