"""A mixture of experts on a CPU, computed from the stacked weights as they are: plain products of the experts with
tokens.

In the place of vLLM's kernel, which reads packed weights alone. An operator of its own, which a compiler leaves alone.
Must not know: the trainer, sockets, vLLM.
Invariants: sums over a token's experts are in fp32; an expert without tokens is not read.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


@torch.library.custom_op("tandem::experts", mutates_args=("out",))
def _experts(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    act: str,
    weighted: bool,
) -> None:
    """out: [T, H]; x: [T, H]; w13: [E, 2I, H]; w2: [E, H, I]; weights: fp32 [T, K]; ids: [T, K]."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], w13[expert]).chunk(2, dim=-1)
        made = functional.linear(ACTIVATIONS[act](gate) * up, w2[expert]).float()
        total.index_add_(0, token, made if weighted else made * weights[token, place, None].float())
    out.copy_(total)


def run(
    out: torch.Tensor,
    input: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    act: str,
    isa: str,
    skip_weighted: bool = False,
) -> None:
    """As vLLM's cpu_fused_moe, on weights that are not packed. ValueError for biases and other activations."""
    if w13_bias is not None or w2_bias is not None or act not in ACTIVATIONS:
        raise ValueError(f"Tandem computes experts without biases and by {', '.join(ACTIVATIONS)} alone, not {act}")
    _experts(out, input, w13, w2, topk_weights, topk_ids, act, skip_weighted)
