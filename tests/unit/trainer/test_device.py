"""How the trainer's allocator is set, and that nobody else's is. What it brings is in benchmarks/RESULTS.md."""

import os

import pytest

from worker.trainer.device import ALLOCATOR_ENV, growing_segments


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_ENV:
        monkeypatch.delenv(name, raising=False)


def test_segments_grow_for_the_first_allocation_alone() -> None:
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), growing_segments():
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        raise ZeroDivisionError
    assert dict(os.environ) == before, "a server that is started next must not inherit it"


@pytest.mark.parametrize("name", ALLOCATOR_ENV)
def test_what_the_user_said_of_the_allocator_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    before = dict(os.environ)
    with growing_segments():
        assert dict(os.environ) == before
    assert dict(os.environ) == before
