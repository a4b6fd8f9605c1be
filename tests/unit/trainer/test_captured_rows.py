"""What is captured and lent where something fails, as far as it can be seen without a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.trainer import captured_rows
from worker.trainer.captured_rows import CapturedRows


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were lent. Of CUDA nothing is there; of a row only whether it fails, which one of 512 tokens does."""

    class Row:
        def __init__(self, body: Any, sweep: Any, tokens: int, streams: Any) -> None:
            self.tokens = tokens
            if tokens == 512:
                raise torch.OutOfMemoryError("out of memory")

        def capture(self, sweep: Any, pool: Any) -> None: ...

    found: list[int] = []
    for name, made in {"memory_reserved": 0, "synchronize": None, "empty_cache": None, "Stream": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, made=made: made)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(captured_rows, "CapturedRow", Row)
    monkeypatch.setattr(captured_rows, "_undone_if_it_fails", lambda pool: nullcontext())
    monkeypatch.setattr(captured_rows, "alias", lambda tensor: tensor)
    monkeypatch.setattr(captured_rows, "lend", lambda model, region: found.append(region.nbytes))
    return found


@pytest.mark.parametrize(("sizes", "whole"), [((448, 256), True), ((512, 448, 256), False)])
def test_where_a_rows_first_run_fails_nothing_is_lent(lent: list[int], sizes: tuple[int, ...], whole: bool) -> None:
    """Its batches would be launched beside the graphs, for which there is no memory."""
    rows, sweep = CapturedRows(), SimpleNamespace(factors=SimpleNamespace(recording=nullcontext))
    assert rows.capture(None, sweep, dict.fromkeys(sizes, True)) is whole  # type: ignore[arg-type]
    assert len(rows) == 2
    rows.lend(torch.nn.Linear(2, 2), 1024)
    assert (lent, len(rows)) == (([1024], 2) if whole else ([], 0))
