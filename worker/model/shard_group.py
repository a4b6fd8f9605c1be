"""The processes that hold one model's shards, and the sums over them: torch.distributed behind a few functions.

    shards = ShardGroup()                       # gloo on CPUs, NCCL on GPUs
    shards.add_up([squares, r])                 # in place, for the optimizer
    x = shards.summed(partial)                  # Megatron's g: the sum forward, the same gradient to each backward
    x = shards.spread(x)                        # Megatron's f: the same value forward, the gradients' sum backward

On a GPU a sum is ordered with what the device does before and after it on the current stream, forward's or backward's,
and the host waits for none. One that somebody takes no part in does not end by itself: `watch` ends it.

Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3. Must not know: the optimizer, the server.
Invariants: all processes call alike, in the same order; what a sum gives is the same, bit for bit, on each.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Watch(Protocol):
    """What looks after sums on a GPU: `worker.distributed.rank_processes.RankProcesses`."""

    def check(self) -> None:
        """Raises where sums were given up: no other may begin, and what they left means nothing."""

    def began(self, ended: Callable[[], bool]) -> None:
        """One was launched; `ended()` says whether the device is through with it."""


class ShardGroup:
    """Sums over `group` (None: the default one, whichever it is at the time)."""

    def __init__(self, group: dist.ProcessGroup | None = None, watch: Watch | None = None) -> None:
        self._group, self._watch = group, watch
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place. Those of one dtype travel together."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()]
            if not some:
                continue
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
            self._reduce(flat)
            parts = flat.split([tensor.numel() for tensor in some])
            for tensor, part in zip(some, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def total(self, part: Tensor) -> Tensor:
        """The sum of all processes' `part`, a new tensor without a gradient."""
        return self._reduce(part.detach().clone(memory_format=torch.contiguous_format))

    def highest(self, part: Tensor) -> Tensor:
        """The elementwise maximum of all processes' `part`, a new tensor without a gradient."""
        return self._reduce(part.detach().clone(memory_format=torch.contiguous_format), dist.ReduceOp.MAX)

    def gathered(self, part: Tensor) -> list[Tensor]:
        """All processes' `part`, which have one shape, in the order of their ranks."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        self._check()
        dist.all_gather(parts, part.contiguous(), group=self._group)
        self._began(part)
        return parts

    def _reduce(self, tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
        """`tensor`, contiguous, in place."""
        self._check()
        dist.all_reduce(tensor, how, group=self._group)
        self._began(tensor)
        return tensor

    def _check(self) -> None:
        if self._watch is not None:
            self._watch.check()

    def _began(self, tensor: Tensor) -> None:
        if self._watch is not None and tensor.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._watch.began(event.query)

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
