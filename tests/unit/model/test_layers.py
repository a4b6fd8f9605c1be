"""Which layers a model has, by kind, and the few that show all kernels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.model.layers import first_of_each_kind, kinds_of, layers_of, recompute
from worker.testing.tiny_architectures import make_architecture
from worker.utils import torch_setup

ROW = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str, dict[str, Any]], Any]:
    torch_setup.prepare()

    def make(model_type: str, changes: dict[str, Any]) -> Any:
        return AutoModelForCausalLM.from_pretrained(make_architecture(tmp_path / "m", model_type, changes=changes))

    return make


FULL, SLIDING, GDN = "full_attention", "sliding_attention", "linear_attention"


@pytest.mark.parametrize(
    ("model_type", "types", "few"),
    [
        ("llama", [None] * 5, 1),
        ("gemma3_text", [SLIDING, SLIDING, FULL, SLIDING], 3),
        ("qwen3_5_moe_text", [GDN, GDN, GDN, FULL] * 2, 4),
    ],
)
def test_the_first_layers_of_each_kind_are_a_model(
    load: Callable[[str, dict[str, Any]], Any], model_type: str, types: list[str | None], few: int
) -> None:
    listed = {"layer_types": types} if types[0] else {}
    model = load(model_type, {"num_hidden_layers": len(types), **listed})
    kinds = kinds_of(model)
    assert len(kinds) == len(types) and len(set(kinds)) == len(set(types))
    ran: list[int] = []
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    names, before = list(model.state_dict()), model(ROW).logits
    assert ran == list(range(len(types)))
    ran.clear()
    with first_of_each_kind(model):
        model(ROW).logits.sum().backward()
    assert ran == list(range(few))
    model.train()
    recompute(model, lambda tokens: len(types) - 1)  # as on a GPU: the first layer is computed again in backward
    ran.clear()
    with first_of_each_kind(model):
        model(ROW).logits.sum().backward()
    assert sorted(ran) == [0, *range(few)]
    model.eval()
    assert list(model.state_dict()) == names
    assert torch.equal(model(ROW).logits, before)


def test_a_model_has_its_layers_again_after_an_error(load: Callable[[str, dict[str, Any]], Any]) -> None:
    model = load("llama", {})
    with pytest.raises(KeyboardInterrupt), first_of_each_kind(model):
        assert len(model.model.layers) == 1
        raise KeyboardInterrupt
    assert len(layers_of(model)) == 2


def test_a_layer_of_other_shapes_is_of_another_kind(load: Callable[[str, dict[str, Any]], Any]) -> None:
    """Its products have kernels of their own."""
    model = load("llama", {"num_hidden_layers": 4})
    odd = model.model.layers[2].mlp
    odd.gate_proj, odd.up_proj = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
    odd.down_proj = torch.nn.Linear(96, 64, bias=False)
    with first_of_each_kind(model):
        assert len(model.model.layers) == 3
