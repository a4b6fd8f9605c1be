"""Training threads: as many as CPUs are free. Beside a real server: tests/server/test_serving_through_writes.py."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from worker.trainer.threads import GPU_THREADS, TrainingThreads
from worker.utils import free_cpus

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("free", "threads"), [(0.0, 1), (0.7, 1), (1.7, 1), (1.8, 2), (3.9, 4), (60.0, 4)])
def test_a_version_takes_what_is_free_and_no_more_than_torch_would(free: float, threads: int) -> None:
    torch.set_num_threads(4)
    TrainingThreads(free=lambda: free).begin_version(CPU)
    assert torch.get_num_threads() == threads


def test_the_number_is_looked_at_again_before_each_version() -> None:
    torch.set_num_threads(4)
    found = iter([1.0, 4.0])
    threads = TrainingThreads(free=lambda: next(found))
    for expected in (1, 4):
        threads.begin_version(CPU)
        assert torch.get_num_threads() == expected


def test_processes_that_train_together_share_what_is_free() -> None:
    torch.set_num_threads(4)
    threads = TrainingThreads(free=lambda: 4.0)
    for processes, expected in ((2, 2), (3, 1), (8, 1)):
        threads.begin_version(CPU, processes)
        assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("most", "threads"), [(2, 2), (64, GPU_THREADS)])
def test_beside_a_gpu_few_threads_do_whatever_is_free(most: int, threads: int) -> None:
    torch.set_num_threads(most)
    TrainingThreads(free=lambda: 0.0).begin_version(torch.device("cuda"))
    assert torch.get_num_threads() == threads


def test_a_number_that_was_asked_for_stays() -> None:
    torch.set_num_threads(4)
    threads = TrainingThreads(2, free=lambda: 0.0)
    threads.begin_version(CPU)
    assert torch.get_num_threads() == 2


def test_cpus_that_are_kept_busy_are_not_free() -> None:
    """One CPU, this thread's own, spun by it for the whole time that is looked at."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})  # of this thread alone
    try:

        def spin(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass

        assert threading.current_thread() is threading.main_thread()
        assert free_cpus.free_cpus(0.5, sleep=spin) < 0.2
    finally:
        os.sched_setaffinity(0, cpus)
    assert 0 <= free_cpus.free_cpus(0.1) <= len(cpus) + 0.5


def test_idle_time_is_counted_on_the_cpus_of_this_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(mine: int, others: int) -> None:
        rows = [f"cpu  9 9 9 {mine + others} 0", f"cpu0 9 9 9 {mine} {mine}", f"cpu1 9 9 9 {others} 0", "intr 1"]
        (tmp_path / "stat").write_text("\n".join(rows) + "\n")

    monkeypatch.setattr(free_cpus, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    stat(100, 100)
    assert free_cpus.free_cpus(1.0, sleep=lambda _: stat(100, 900)) == 0.0
    assert free_cpus.free_cpus(1.0, sleep=lambda _: stat(200, 900)) > 0.0
