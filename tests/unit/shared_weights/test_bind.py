"""transformers' model on tensors of others computes what a loaded one computes, and none of the tensors is written
to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.shared_weights.bind import build_model
from worker.shared_weights.errors import AttachError
from worker.testing.tiny_architectures import ARCHITECTURES

ROW = torch.arange(3, 67)[None]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_are_those_of_a_loaded_model_bit_for_bit(architecture: Callable[[str], Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture(name), dtype=torch.bfloat16).eval()
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    bound = build_model(architecture(name), tensors).eval()
    assert torch.equal(bound(input_ids=ROW).logits, model(input_ids=ROW).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
    assert all(p.data_ptr() == tensors[name].data_ptr() for name, p in bound.named_parameters())


def test_a_buffer_that_transformers_does_not_compute_is_refused(
    architecture: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = architecture("llama")
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM.__init__

    def with_buffer(self: Any, config: object) -> None:
        made(self, config)
        self.register_buffer("table", torch.ones(3), persistent=False)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    tensors = {n: p.data for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    with pytest.raises(AttachError, match="buffer table of transformers' model is not in the checkpoint"):
        build_model(folder, tensors)
