"""How far groups of tensors moved: sums of squares, by layer and part."""

import pytest
import torch

from worker.operations.difference import norms


def test_norms_are_of_all_elements_of_a_group() -> None:
    first = {
        "model.embed_tokens.weight": torch.full((2, 2), 2.0),
        "model.layers.0.self_attn.q_proj.weight": torch.full((4,), 1.0),
        "model.layers.0.self_attn.k_proj.weight": torch.full((12,), 1.0),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(3),
        "model.layers.10.linear_attn.A_log": torch.full((2,), 3.0),
        "model.layers.2.input_layernorm.weight": torch.full((2,), 1.0),
    }
    second = {name: tensor.clone() for name, tensor in first.items()}
    second["model.layers.0.self_attn.q_proj.weight"] += 2.0
    second["model.layers.10.linear_attn.A_log"] -= 0.3
    found = norms(first, second)
    names = [(one.layer, one.part) for one in found]
    assert names == [(0, "attention"), (0, "mlp"), (2, "other"), (10, "attention"), (None, "embed_tokens")]
    attention, mlp, _, tenth, table = found
    assert (attention.elements, attention.change, attention.size) == (16, 1.0, 1.0)
    assert mlp.relative == 0.0 and table.relative == 0.0
    assert tenth.relative == pytest.approx(0.1)


def test_small_changes_of_bf16_weights_are_not_lost_in_the_sum() -> None:
    first = {"model.layers.0.mlp.w": torch.full((100_000,), 1.0, dtype=torch.bfloat16)}
    second = {"model.layers.0.mlp.w": torch.full((100_000,), 1.0078125, dtype=torch.bfloat16)}
    (one,) = norms(first, second)
    assert one.change == pytest.approx(0.0078125, rel=1e-9) and one.size == pytest.approx(1.0, rel=1e-9)
