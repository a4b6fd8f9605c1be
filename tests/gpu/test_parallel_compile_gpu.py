"""Candidates of a Triton kernel are compiled side by side, and what is chosen computes what it should."""

import logging
import threading

import pytest
import torch

from worker.trainer.parallel_compile import parallel_compile

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and this machine has none"),
]
BLOCKS = (64, 128, 256, 512, 1024, 2048)


@triton.autotune([triton.Config({"BLOCK": block}, num_warps=4) for block in BLOCKS], key=["size"])
@triton.jit
def doubled(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(y + at, 2 * tl.load(x + at, mask=inside), mask=inside)


def run(size: int) -> None:
    x = torch.arange(size, device="cuda", dtype=torch.float32)
    y = torch.full_like(x, -1.0)
    doubled[lambda meta: (triton.cdiv(size, meta["BLOCK"]),)](x, y, size)
    assert torch.equal(y, 2 * x)


def test_all_candidates_are_compiled_before_the_first_is_timed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # nothing is compiled yet
    finished: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **hook: finished.append(hook["repr"]))
    timed_after: list[int] = []
    bench = Autotuner._bench

    def counted(self, *arguments, **meta):
        timed_after.append(len(finished))
        return bench(self, *arguments, **meta)

    monkeypatch.setattr(Autotuner, "_bench", counted)
    with parallel_compile() as compiled:
        run(10_000)
        run(10_000)  # tuned already
    assert (compiled.kernels, compiled.candidates) == (1, len(BLOCKS))
    assert timed_after == [len(BLOCKS)] * len(BLOCKS)
    assert Autotuner._bench is counted
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile")]
    run(20_000)
    assert (compiled.kernels, compiled.candidates) == (1, len(BLOCKS))  # ended with the context


def test_a_triton_without_these_parts_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(Autotuner, "_bench")
    with caplog.at_level(logging.WARNING), parallel_compile() as compiled:
        pass
    assert "one after the other" in caplog.text
    assert compiled.kernels == 0
