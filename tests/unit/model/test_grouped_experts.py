"""A mixture's experts as grouped products: asked for where a model offers them, and the gradient of an expert without
tokens is all zeros, which is how the optimizer knows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.model.experts import GROUPED, ExpertsError, group_experts

IDS = torch.arange(5, 12)[None]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_grouped_products_are_the_experts_one_by_one(architecture: Callable[[str], Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture(name), dtype=torch.float32)
    losses, gradients = [], []
    for chosen in ("eager", GROUPED):
        if chosen == GROUPED:
            group_experts(model)
        else:
            model.set_experts_implementation(chosen)
        assert model.config._experts_implementation == chosen
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if ".experts." in n})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    eager, grouped = gradients
    idle = 0
    for key in eager:
        assert torch.allclose(eager[key], grouped[key], rtol=1e-3, atol=1e-6), key
        zero = [[not g.any() for g in found[key]] for found in (eager, grouped)]
        assert zero[0] == zero[1], key
        idle += sum(zero[0])
    assert eager and (idle or name != "qwen3_moe"), "an expert without tokens is among them"


def test_a_torch_under_which_idle_experts_would_learn_is_refused(
    architecture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a product of nothing leaves its memory as it was."""
    plain = torch.nn.functional.grouped_mm

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            return plain(x, weight, offs=offs)

        @staticmethod
        def backward(ctx: Any, outer: torch.Tensor) -> tuple[None, torch.Tensor, None]:
            return None, torch.full((3, 64, 64), 8.0, dtype=torch.bfloat16), None

    monkeypatch.setattr(torch.nn.functional, GROUPED, lambda x, weight, offs: Careless.apply(x, weight, offs))
    model = AutoModelForCausalLM.from_pretrained(architecture("qwen3_moe"), dtype=torch.bfloat16)
    with pytest.raises(ExpertsError, match="leaves the gradient of an expert without tokens undefined"):
        group_experts(model)


def test_a_model_without_them_is_refused(architecture: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture("llama"), dtype=torch.bfloat16)
    with pytest.raises(ExpertsError, match="LlamaForCausalLM does not offer"):
        group_experts(model)
