"""What tests here share: a server's stand-in with a Redis and a state directory of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from durable_parts import QUIET, Site


@pytest.fixture
def site(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    running = Site(tmp_path, tiny_model)
    yield running
    running.close()


@pytest.fixture
def taught(site: Site) -> Site:
    """Versions 1 to 4 of two transcripts each: x-0 and x-1, x-2 and x-3, ..."""
    site.send("x", 8)
    site.work(*QUIET)
    assert site.agree() == 4
    return site


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """A worker in this process has torch choose algorithms that repeat; the other tests never asked for them."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
