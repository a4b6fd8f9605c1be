"""On a real GPU a kernel runs as a table says, computes what it should, and is not timed."""

import importlib

import pytest
import torch

from worker.trainer.tuned_kernels import card_of, shipped_table, source_of, tuned_kernels
from worker.trainer.tuned_table import Table, read, write

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and this machine has none"),
]
BLOCKS = (64, 256, 1024)


def kernel():
    """A kernel that was never tuned."""

    @triton.autotune([triton.Config({"BLOCK": block}, num_warps=4) for block in BLOCKS], key=["size"])
    @triton.jit
    def doubled(x, y, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        tl.store(y + at, 2 * tl.load(x + at, mask=inside), mask=inside)

    return doubled


def run(made, size: int = 10_000) -> None:
    x = torch.arange(size, device="cuda", dtype=torch.float32)
    y = torch.full_like(x, -1.0)
    made[lambda meta: (triton.cdiv(size, meta["BLOCK"]),)](x, y, size)
    assert torch.equal(y, 2 * x)


def test_a_recorded_winner_runs_untimed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    card, bench, timed = card_of(torch.device("cuda", 0)), Autotuner._bench, []

    def counted(self, *arguments, **meta):
        timed.append(meta["config"])
        return bench(self, *arguments, **meta)

    monkeypatch.setattr(Autotuner, "_bench", counted)
    with tuned_kernels(None) as tuned:
        run(kernel())
    assert len(timed) == len(BLOCKS)
    write(tmp_path / "table.json", [tuned.recorded(card, triton.__version__)])
    (table,) = read(tmp_path / "table.json")
    with tuned_kernels(table) as tuned:
        run(kernel())
    assert (tuned.known, tuned.timed, len(timed)) == (1, 0, len(BLOCKS))


def test_a_winner_that_this_card_cannot_run_is_tuned_instead(caplog: pytest.LogCaptureFixture) -> None:
    """The table says what is a candidate, but asks for more shared memory than a block can have."""

    @triton.autotune([triton.Config({}, num_stages=stages) for stages in (2, 40)], key=["size"])
    @triton.jit
    def product(x, y, size: tl.constexpr):
        at = tl.arange(0, 64)
        total = tl.zeros((64, 64), tl.float32)
        for start in range(0, size, 64):
            left = tl.load(x + at[:, None] * size + start + at[None, :])
            total = tl.dot(left, tl.load(x + (start + at[:, None]) + at[None, :] * size), total)
        tl.store(y + at[:, None] * 64 + at[None, :], total)

    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(64, 64, device="cuda")
    with tuned_kernels(None) as tuned:
        product[(1,)](x, y, 4096)
    ((name, source, key, options),) = tuned.chosen
    assert options["num_stages"] == 2, "the other cannot be launched"
    table = Table(card_of(x.device), triton.__version__)
    table.add(name, source, key, options | {"num_stages": 40})
    product.cache.clear()
    with tuned_kernels(table) as tuned:
        product[(1,)](x, y, 4096)
    assert (tuned.known, tuned.timed) == (0, 1)
    assert "does not run as the table says" in caplog.text and "shared memory" in caplog.text
    assert torch.allclose(y, x.float() @ x.float().T, rtol=1e-2, atol=1e-1)


def test_what_ships_for_this_card_is_found_or_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    table = shipped_table(card_of(torch.device("cuda", 0)))
    assert table is not None or "no table of tuned kernels for" in caplog.text


def test_what_ships_names_the_kernels_that_are_installed() -> None:
    """An update of fla that changes a kernel has it tuned again, which is slow and right: record it again."""
    table = shipped_table(card_of(torch.device("cuda", 0)))
    if table is None:
        pytest.skip("no table ships for this card and Triton")
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    for kernel, known in table.kernels.items():
        module, _, name = kernel.rpartition(".")
        assert source_of(getattr(importlib.import_module(module), name)) == known.source, kernel
