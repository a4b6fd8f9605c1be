"""Long rows keep their layers' inputs in the memory of short rows' graphs, on a GPU: nothing grows, and steps end where
they end without."""

import gc
from typing import Any

import pytest
import torch
from test_model_gpu import on_gpu, reference, rows_of

from worker.model.inputs import PLACES
from worker.trainer.captured_rows import CapturedRows
from worker.trainer.kernel_warmup import warm_up

__all__ = ["reference"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LENT = 4 * 1024 * 256 * 2
"""Bytes of the inputs of four layers, 256 wide, in bf16, for a row of 1,024 tokens."""
CUTS = [[512], [700], [171, 341], [1000], [64] * 8, [30] * PLACES, [263], [1000], [512]] * 2


def test_steps_are_those_of_a_trainer_whose_graphs_lend_nothing(
    reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[dict[str, torch.Tensor]] = []
    grown: list[int] = []
    lend = CapturedRows.lend

    def watched(rows: CapturedRows, model: Any, size: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        lend(rows, model, size)
        grown.append(torch.cuda.memory_reserved() - before)

    monkeypatch.setattr(CapturedRows, "lend", watched)
    for lent in (0, LENT):
        trainer = on_gpu(reference, way="streaming", kept=0)
        trainer.by_factors, trainer.places = 512, PLACES - 1
        warm_up(trainer, replayed=[size for size in trainer.sizes if size <= 512], lent=lent)
        assert len(trainer.rows) == 3
        said = {}
        for number, row in enumerate(rows_of(CUTS)):
            said[f"loss {number}"] = torch.tensor(trainer.begin(row).loss)
            short = sum(CUTS[number]) <= 512 and len(CUTS[number]) < PLACES
            assert (trainer.begun, trainer.replayed) == (("factors", True) if short else ("streaming", False))
            if lent:
                used = trainer.rows._lent
                assert used is not None and used.is_used == (not short), "from a long row's forward pass on"
            trainer.gradient_norm()
            trainer.prepare()
            trainer.apply()
            trainer.optimizer.check()
        ends.append(said | {name: p.detach().cpu() for name, p in trainer.model.named_parameters()})
    assert len(grown) == 1 and grown[0] <= 0, f"it is the graphs' own, and took {grown}"
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name].float(), ends[0][name].float(), rtol=0.05, atol=0.01, msg=name)
