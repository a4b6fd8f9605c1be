"""What a model does after its hidden states is found by asking it, and what is not understood is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.model.head_blocks import PLAIN, logits_of
from worker.model.output_head import HeadError, head_of
from worker.testing.tiny_architectures import ARCHITECTURES
from worker.utils import torch_setup

AFTER = {"granite": (0.25, None), "cohere": (0.25, None), "cohere2": (0.25, None), "gemma2": (1.0, 1.5)}
ROW = torch.arange(3, 40)[None]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_head_makes_the_logits_of_the_model(architecture: Callable[[str], Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture(name), dtype=torch.float32)
    head = head_of(model)
    assert (head.after.scale, head.after.cap) == pytest.approx(AFTER.get(name, (1.0, None)))
    assert (head.after.bias is not None) == (name == "phi")
    assert name in (*AFTER, "phi") or head.after == PLAIN
    hidden = model.base_model(input_ids=ROW, use_cache=False).last_hidden_state[0]
    logits = model(input_ids=ROW, use_cache=False).logits[0]  # the model is as before
    torch.testing.assert_close(logits_of(hidden, head.weight, 0, head.after), logits, rtol=1e-4, atol=1e-4)


def odd(
    logits: Callable[[Any], Any] = lambda z: z, hidden: Callable[[Any], Any] = lambda h: h, calls: int = 1
) -> torch.nn.Module:
    """A small Llama whose forward does something else with hidden states or logits."""
    torch_setup.prepare()  # before transformers looks at torchvision
    from transformers import LlamaConfig, LlamaForCausalLM

    class Odd(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **named: Any) -> Any:
            states = hidden(self.model(input_ids=input_ids, **named).last_hidden_state)
            found = [self.lm_head(states) for _ in range(calls)]
            return SimpleNamespace(logits=logits(found[0]) if found else states)

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Odd(LlamaConfig(vocab_size=300, **sizes))


def test_a_factor_before_the_head_is_found_too() -> None:
    assert head_of(odd(hidden=lambda h: h / 8)).after.scale == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("doing", "says"),
    [
        ({"logits": lambda z: z + 1}, "changes its logits"),
        ({"logits": lambda z: -z}, "changes its logits"),
        ({"logits": lambda z: z.sign() * z.abs().sqrt()}, "changes its logits"),
        ({"logits": lambda z: z.clamp(max=30)}, "changes its logits"),
        ({"logits": lambda z: z.index_fill(2, torch.tensor([7]), -torch.inf)}, "changes its logits"),
        ({"hidden": lambda h: h.cumsum(2)}, "changes its last hidden states"),
        ({"calls": 2}, "does not hand its last hidden states"),
        ({"calls": 0}, "does not hand its last hidden states"),
    ],
)
def test_anything_else_is_refused(doing: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        head_of(odd(**doing))


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = odd()
    model.lm_head = torch.nn.Bilinear(16, 16, 300)
    with pytest.raises(HeadError, match="no plain linear layer"):
        head_of(model)
