"""What GPU tests compare with is computed on the CPU, by few threads: the many of a large host wait for each other at
every operation, if other tests run beside them (four seconds took four minutes)."""

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
