"""The processes that hold one model's shards, and the sums over them: torch.distributed behind a few functions.

    shards = ShardGroup(process_group)          # gloo on CPUs, NCCL on GPUs
    shards.add_up([squares, r])                 # in place, for the optimizer
    x = shards.summed(partial)                  # Megatron's g: the sum forward, the same gradient to each backward
    x = shards.spread(x)                        # Megatron's f: the same value forward, the gradients' sum backward

Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3. Must not know: the optimizer, the server.
Invariants: all processes call alike, in the same order; what a sum gives is the same, bit for bit, on each.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShardGroup:
    """Sums over `group` (None: the default one)."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place. Those of one dtype travel together."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()]
            if not some:
                continue
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
            dist.all_reduce(flat, group=self._group)
            parts = flat.split([tensor.numel() for tensor in some])
            for tensor, part in zip(some, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def total(self, part: Tensor) -> Tensor:
        """The sum of all processes' `part`, a new tensor without a gradient."""
        result = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=self._group)
        return result

    def highest(self, part: Tensor) -> Tensor:
        """The elementwise maximum of all processes' `part`, a new tensor without a gradient."""
        result = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self._group)
        return result

    def gathered(self, part: Tensor) -> list[Tensor]:
        """All processes' `part`, which have one shape, in the order of their ranks."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return parts

    def summed(self, part: Tensor) -> Tensor:
        """Megatron's g: `total` forward, the gradient as it is backward."""
        return _Summed.apply(part, self)  # type: ignore[no-any-return, no-untyped-call]

    def spread(self, x: Tensor) -> Tensor:
        """Megatron's f: `x` forward, the sum of all processes' gradients backward."""
        return _Spread.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: ShardGroup) -> Tensor:
        return shards.total(part)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return outer, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: ShardGroup) -> Tensor:
        ctx.shards = shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.shards.total(outer), None
