"""What the kernels of a GPU compute, in plain torch: for tests on a CPU, and on the meta device to count memory.

    rms_norm(x, weight, eps, offset, wide)      # liger's RMSNorm
    gated(a, b, "silu")                         # liger's SwiGLU and GeGLU: activation(a) * b
    attend_by_sequence(q, k, v, packing, ...)   # varlen FlashAttention, one sequence after another
    attend_on_meta(q, k, v)                     # the same without data

Must not know: the optimizer.
Invariants: norm, gate and the attention of the meta device keep for backward what the kernels keep (liger 0.8.5: a
norm's input and one fp32 number a row; gate and up, into which backward writes their gradients. FlashAttention 2: q, k,
v, output and one fp32 number a row and head), and there their backward takes what the kernels' takes.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from worker.model.inputs import Packing

Activation = Literal["silu", "gelu_tanh"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """By name."""
    return functional.silu(x) if kind == "silu" else functional.gelu(x, approximate="tanh")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
    """x / RMS(x) * (offset + weight). x: [..., n]; weight: [n]; wide: rounded once, at the end, and not before the
    product with the weight too."""
    return _Norm.apply(x, weight, eps, offset, wide)  # type: ignore[no-any-return]


def gated(a: Tensor, b: Tensor, kind: Activation) -> Tensor:
    """activation(a) * b, of a's shape."""
    return _Gate.apply(a, b, kind)  # type: ignore[no-any-return]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
        x = x.contiguous()
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd)
        normed = x.float() * rstd
        if wide:
            return (normed * (offset + weight.float())).to(x.dtype)
        return normed.to(x.dtype) * (offset + weight)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        if x.is_meta:
            return torch.empty_like(x), torch.empty_like(weight), None, None, None
        normed = x.float() * rstd
        inner = outer.float() * (ctx.offset + weight.float())
        dx = rstd * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        dw = (outer.float() * normed).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kind: Activation) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        ctx.kind = kind
        ctx.save_for_backward(a, b)
        if a.is_meta:
            return torch.empty_like(a)
        return (activate(a.float(), kind) * b.float()).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        if a.is_meta:
            return a, b, None
        with torch.enable_grad():
            wide = [some.detach().float().requires_grad_() for some in (a, b)]
            out = activate(wide[0], ctx.kind) * wide[1]
        da, db = torch.autograd.grad(out, wide, outer.float())
        return da.to(a.dtype), db.to(b.dtype), None


def attend_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    """query: [T, heads, size]; key, value: [T, key heads, size] -> [T, heads, size]. window: tokens that a token sees,
    itself included."""
    starts = packing.starts.tolist()
    out = []
    for start, end in pairwise(starts):
        if start == end:
            continue
        q, k, v = (some[start:end].transpose(0, 1)[None] for some in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def attend_on_meta(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `attend_by_sequence`, of tensors on the meta device."""
    return _Attention.apply(query, key, value)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, heads, size = query.shape
        out = query.new_empty(tokens, heads, size)
        ctx.save_for_backward(query, key, value, out, query.new_empty(heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, _, rows = ctx.saved_tensors
        taken = [torch.empty_like(rows), query.new_empty(query.shape, dtype=torch.float32)]  # sums, and dq as it grows
        spread = [torch.empty_like(query) for _ in range(2)] if key.shape[1] != query.shape[1] else []
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del taken, spread
        return found
