"""Full attention over packed sequences: torch's own variable-length FlashAttention, as an attention of transformers.

Checked on torch 2.11 (varlen_attn without enable_gqa, grouped heads accepted) and read for 2.12 and 2.13 (with it).
Invariant: no token sees another sequence's, nor a later one.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from worker.model.inputs import Packing

NAME = "tandem_varlen"


def register() -> str:
    """Make it known to transformers; the name to select it by. ImportError where torch has no varlen attention."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(
        module: torch.nn.Module,
        query: Tensor,  # [1, heads, T, head size]
        key: Tensor,  # [1, key heads, T, head size]
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float,
        packing: Packing,
        **_: Any,
    ) -> tuple[Tensor, None]:
        ends, longest = packing.starts32, packing.longest
        out: Any = varlen_attn(
            query[0].transpose(0, 1),  # [T, heads, head size]
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            ends,
            ends,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            **grouped,
        )  # [T, heads, head size]
        return out[None], None

    AttentionInterface.register(NAME, attend)
    return NAME
