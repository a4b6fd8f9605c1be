"""Full attention over packed sequences: torch's own variable-length FlashAttention, as an attention of transformers.

Checked on torch 2.11 (varlen_attn without enable_gqa, grouped heads accepted) and read for 2.12 and 2.13 (with it).
Invariants: no token sees another sequence's, nor a later one, nor one before its layer's window; what else a layer
wishes of its attention (a cap on its scores, sinks) is refused by name, never left out.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from producer.errors import TandemError
from worker.model.inputs import Packing

NAME = "tandem_varlen"
REFUSED = ("softcap", "s_aux", "position_bias")
"""What layers may wish for and the kernel does not know, by transformers' names (5.17 to 5.19)."""


class AttentionError(TandemError):
    """A layer wants of its attention what the kernel does not do."""


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
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        refuse(module, others)
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
            window_size=window(sliding_window),
            **grouped,
        )  # [T, heads, head size]
        return out[None], None

    AttentionInterface.register(NAME, attend)
    return NAME


def window(sliding: int | None) -> tuple[int, int]:
    """(tokens before, tokens after) that a token sees beside itself; -1: all. sliding: as transformers counts, itself
    included."""
    return (-1 if sliding is None else sliding - 1, 0)


def refuse(module: torch.nn.Module, wishes: Mapping[str, Any]) -> None:
    """Raises AttentionError naming the first of `wishes` that the kernel would leave out."""
    for name in REFUSED:
        if wishes.get(name) is not None:
            raise AttentionError(
                f"{type(module).__name__} wants {name} of its attention, which the kernel of packed rows does not know:"
                " this model cannot be trained on a GPU"
            )
