"""Kernels run as a table says, and are tuned where it does not know them, or is wrong.

Triton compiles for Hopper here, and where it would launch, a stand-in notes it.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton_stand_in import StandInDriver  # noqa: E402

from worker.trainer.parallel_compile import parallel_compile  # noqa: E402
from worker.trainer.tuned_kernels import shipped_table, tuned_kernels  # noqa: E402
from worker.trainer.tuned_table import SHIPPED, Card, Table, read, write  # noqa: E402

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132)
WARPS = (1, 2, 4)


def kernel():
    """A kernel that was never tuned. Its candidates differ in warps."""

    @triton.autotune([triton.Config({"BLOCK": 128}, num_warps=warps) for warps in WARPS], key=["size"])
    @triton.jit
    def doubled(x, y, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, 2 * tl.load(x + at, mask=at < size), mask=at < size)

    return doubled


def run(made, size: int = 64) -> None:
    x = torch.zeros(size)
    made[(1,)](x, torch.empty_like(x), size)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInDriver]:
    """The first candidate that is timed is the slowest: the last one wins."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    # vLLM, where a test before imported it, has Triton read what it chose from the disk: nothing would be timed again.
    monkeypatch.setattr(triton.knobs.autotuning, "cache", False)
    driver = StandInDriver(lambda number: 1 / number)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    yield driver


@pytest.fixture
def table(gpu: StandInDriver) -> Table:
    """What tuning chose for the kernel; the stand-in's launches are forgotten."""
    with tuned_kernels(None) as tuned:
        run(kernel())
    assert (tuned.known, tuned.timed, gpu.timed) == (0, 1, len(WARPS))
    gpu.launched.clear()
    gpu.timed = 0
    return tuned.recorded(H100, triton.__version__)


def test_what_was_recorded_runs_without_its_other_candidates(gpu: StandInDriver, table: Table, tmp_path: Path) -> None:
    write(tmp_path / "table.json", [table])
    with parallel_compile() as compiled, tuned_kernels(read(tmp_path / "table.json")[0]) as tuned:
        run(made := kernel())
        run(made)
    assert gpu.launched == [4, 4] and gpu.timed == 0
    assert (tuned.known, tuned.timed, compiled.candidates) == (1, 0, 0)
    assert str(tuned) == "1 of 1 kernels run as tuned on NVIDIA H100 80GB HBM3"
    assert tuned.recorded(H100, triton.__version__) == table
    run(made)  # after the context
    assert gpu.launched == [4, 4, 4] and gpu.timed == 0


def test_another_key_is_tuned(gpu: StandInDriver, table: Table) -> None:
    with parallel_compile() as compiled, tuned_kernels(table) as tuned:
        run(made := kernel(), 64)
        run(made, 96)
    assert (tuned.known, tuned.timed, compiled.candidates, gpu.timed) == (1, 1, len(WARPS), len(WARPS))
    assert "1 of 2 kernels run as tuned on" in str(tuned) and "1 were tuned here" in str(tuned)


def test_a_kernel_of_another_source_is_tuned_and_named(gpu: StandInDriver, table: Table) -> None:
    (name,) = table.kernels
    other = Table(H100, triton.__version__)
    for key, options in table.kernels[name].winners.items():
        other.add(name, "another", key, options)
    with tuned_kernels(other) as tuned:
        run(kernel())
    assert (tuned.known, tuned.timed, gpu.timed) == (0, 1, len(WARPS))
    assert tuned.other_sources == {name}


def test_options_that_no_candidate_has_are_not_used(
    gpu: StandInDriver, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    (found,) = table.kernels.values()
    for options in found.winners.values():
        options["num_warps"] = 32
    with tuned_kernels(table) as tuned:
        run(kernel())
    assert (tuned.known, tuned.timed, gpu.timed) == (0, 1, len(WARPS))
    assert "doubled has no candidate {'BLOCK': 128, 'num_warps': 32" in caplog.text


def test_a_winner_that_does_not_launch_is_tuned_instead(
    gpu: StandInDriver, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.threads = 64  # two warps
    with tuned_kernels(table) as tuned:
        run(kernel())
    assert (tuned.known, tuned.timed) == (0, 1)
    assert gpu.launched[-1] == 2, "the best of those that launch"
    assert "doubled does not run as the table says" in caplog.text and "Hardware limit: 64" in caplog.text


def test_a_winner_that_does_not_compile_is_tuned_instead(
    gpu: StandInDriver, table: Table, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile, failed = triton.compiler.compile, []

    def refused(*arguments, **options):
        if options["options"]["num_warps"] == 4 and not failed:
            failed.append(1)
            raise RuntimeError("PassManager::run failed")
        return compile(*arguments, **options)

    monkeypatch.setattr(triton.compiler, "compile", refused)
    with tuned_kernels(table) as tuned:
        run(kernel())
    assert failed and (tuned.known, tuned.timed) == (0, 1)
    assert "PassManager::run failed" in caplog.text


def test_triton_is_as_it_was_afterwards(gpu: StandInDriver) -> None:
    before = Autotuner.run
    with pytest.raises(ZeroDivisionError), tuned_kernels(None):
        assert Autotuner.run is not before
        raise ZeroDivisionError
    assert Autotuner.run is before


def test_a_triton_without_these_parts_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(Autotuner, "prune_configs")
    with tuned_kernels(None) as tuned:
        pass
    assert "takes no table of tuned kernels" in caplog.text and tuned.timed == 0


def test_a_card_that_nobody_recorded_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert shipped_table(Card("NVIDIA A100-SXM4-80GB", (8, 0), 108)) is None
    assert "no table of tuned kernels for NVIDIA A100-SXM4-80GB with triton" in caplog.text


def test_a_broken_file_is_said_and_kernels_are_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (broken := tmp_path / "table.json").write_bytes(SHIPPED.read_bytes()[:-20])
    assert shipped_table(H100, broken) is None
    assert f"{broken}: the table of tuned kernels cannot be read" in caplog.text
    assert "Kernels are tuned instead" in caplog.text
