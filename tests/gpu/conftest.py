"""What GPU tests compare with is computed on the CPU: by few threads, since the many of a large host, beside other tests,
wait for each other at every operation (a test of four seconds took four minutes)."""

from collections.abc import Iterator

import pytest
import torch

THREADS = 8


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    yield
    torch.set_num_threads(before)
