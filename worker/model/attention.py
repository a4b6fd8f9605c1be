"""Attention over packed sequences: torch's own variable-length FlashAttention, as an attention of transformers.

Checked on torch 2.11 (varlen_attn without enable_gqa, grouped heads accepted) and read for 2.12 and 2.13 (with it). On
a CPU, and on the meta device, `worker.model.stand_ins` compute in its place: for tests, and to count memory.
Invariants: no token sees another sequence's, nor a later one, nor one before its layer's window; what else a layer
wishes of its attention (a cap on its scores, sinks) is refused by name, never left out.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from producer.errors import TandemError
from worker.model.inputs import Packing
from worker.model.stand_ins import attend_by_sequence, attend_on_meta

NAME = "tandem_varlen"
REFUSED = ("softcap", "s_aux", "position_bias")
"""What layers may wish for and the kernel does not know, by transformers' names (5.17 to 5.19)."""
LARGEST_HEAD = 256
"""Numbers of a head: FlashAttention's limit."""


class AttentionError(TandemError):
    """A layer wants of its attention what the kernel does not do."""


def register() -> str:
    """Make it known to transformers; the name to select it by. ImportError where a GPU's torch has no varlen
    attention."""
    from transformers import AttentionInterface

    if torch.cuda.is_available():
        _varlen()
    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head size]
    key: Tensor,  # [1, key heads, T, head size]
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it. Raises AttentionError."""
    refuse(module, others)
    if packing is None:
        raise AttentionError(f"{type(module).__name__} is not told where packed sequences begin: {UNTRAINABLE}")
    if query.shape[-1] > LARGEST_HEAD or value.shape[-1] != query.shape[-1]:
        raise AttentionError(
            f"{type(module).__name__} has heads of {query.shape[-1]} numbers, and values of {value.shape[-1]}; the"
            f" kernel of packed rows takes up to {LARGEST_HEAD}, and as many of both: {UNTRAINABLE}"
        )
    q, k, v = (some[0].transpose(0, 1) for some in (query, key, value))  # [T, heads, head size]
    if query.is_cuda:
        out = _on_gpu(q, k, v, packing, scaling, sliding_window)
    elif query.is_meta:
        out = attend_on_meta(q, k, v)
    else:
        out = attend_by_sequence(q, k, v, packing, scaling, sliding_window)
    return out[None], None


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float, sliding: int | None) -> Tensor:
    varlen_attn, grouped = _varlen()
    ends, longest = packing.starts32, packing.longest
    return varlen_attn(  # type: ignore[no-any-return]
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window(sliding), **grouped
    )


@cache
def _varlen() -> tuple[Any, dict[str, Any]]:
    from torch.nn.attention.varlen import varlen_attn

    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if grouped else {}


def window(sliding: int | None) -> tuple[int, int]:
    """(tokens before, tokens after) that a token sees beside itself; -1: all. sliding: as transformers counts, itself
    included."""
    return (-1 if sliding is None else sliding - 1, 0)


UNTRAINABLE = "this model cannot be trained on a GPU"


def refuse(module: torch.nn.Module, wishes: Mapping[str, Any]) -> None:
    """Raises AttentionError naming the first of `wishes` that the kernel would leave out."""
    for name in REFUSED:
        if wishes.get(name) is not None:
            raise AttentionError(
                f"{type(module).__name__} wants {name} of its attention, which the kernel of packed rows does not know:"
                f" {UNTRAINABLE}"
            )
    causal = wishes.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise AttentionError(f"{type(module).__name__} lets tokens see later ones: {UNTRAINABLE}")
