"""Which of transformers' attentions trains a model on a CPU: torch's fused one, or the model's own where that knows
less.

transformers hands a layer's wishes (a cap on its scores, attention sinks) to whatever attention is chosen, and its
`sdpa` leaves out those that it does not know, without a word. Here the layers are asked once what they wish for.

Must not know: examples, the optimizer.
Invariants: a model whose layers wish for nothing more keeps `sdpa`, and with it every bit; no parameter is touched.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

ASKED = "tandem_asked"
MORE = {"softcap", "s_aux"}
"""What layers may hand over and `sdpa` does not take, by transformers' names (5.17 to 5.19). What a model's own
attention takes by name is added."""


@torch.no_grad()
def settle_attention(model: Any) -> None:
    """Switch `model`, a transformers model with `sdpa`, to its own (`eager`) attention if a layer asks for more."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return
    known = inspect.signature(sdpa_attention_forward).parameters.keys()
    wishes: set[str] = set()

    def ask(module: torch.nn.Module, *tensors: Any, **named: Any) -> Any:
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        taken = MORE if own is None else MORE | inspect.signature(own).parameters.keys()
        wishes.update(name for name, value in named.items() if value is not None and name in taken - known)
        return sdpa_attention_forward(module, *tensors, **named)

    AttentionInterface.register(ASKED, ask)
    AttentionMaskInterface.register(ASKED, sdpa_mask)
    model.set_attn_implementation(ASKED)
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    model.set_attn_implementation("eager" if wishes else "sdpa")
