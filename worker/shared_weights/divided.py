"""The weights of a server with --tensor-parallel-size as one: all ranks' parts, for who writes checkpoints and headers.

    weights = attach_any(run_dir)           # AttachedWeights of one process, or DividedWeights
    weights.ranks[1].tensors                # what rank 1 holds, as views of its memory
    weights.tensors[name].detach()          # the whole tensor, put together; copy_() writes it into every rank's part

A trainer computes on one rank's part; this is for the process that leads, which opens every rank's memory. The record
of the last batch is rank 0's alone.

Must not know: Redis.
Invariants: rank 0's header, which the server reads, says APPLYING before any other does, and CLEAN with a version after
all others do. So where it says CLEAN, every rank has that version. Ranks that disagree are torn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from worker.apollo.divided_state import put_together, take_apart
from worker.apollo.state_layout import state_bytes
from worker.shared_weights.attach import AttachedWeights, attach
from worker.shared_weights.errors import AttachError
from worker.shared_weights.header import APPLYING, Header
from worker.shared_weights.ranks import DividedError
from worker.utils.shard import Shard, assemble


class DividedWeights(AttachedWeights):
    """Of all `ranks`, in their order. `tensors` and `state` stand in for tensors where those are written to disk, and
    read from it."""

    def __init__(self, ranks: Sequence[AttachedWeights]) -> None:
        first = ranks[0]
        self.ranks = list(ranks)
        parts = {name: [one.shards.get(name) for one in ranks] for name in first.tensors}
        whole = {name: DividedTensor([one.tensors[name] for one in ranks], parts[name]) for name in first.tensors}
        state = DividedState([one.state for one in ranks], list(whole.values()))
        super().__init__(
            header=RankHeaders([one.header for one in ranks]),
            record=first.record,
            state=cast(Tensor, state),
            tensors=cast(dict[str, Tensor], whole),
            frozen=first.frozen,
            model_path=first.model_path,
            server_info=first.server_info,
        )

    def build_model(self, **options: Any) -> Any:
        """Raises `AttachError`: each rank has a model of its own (`worker.model.sharded`)."""
        raise AttachError("weights that are divided over ranks have no model in one process")


def attach_any(run_dir: Path, timeout: float = 60.0) -> AttachedWeights:
    """Open all weights of the server in `run_dir`, in one process or divided. Raises as `attach`."""
    try:
        return attach(run_dir, timeout)
    except DividedError as divided:
        weights = DividedWeights([attach(run_dir, timeout, rank) for rank in range(divided.ranks)])
        if weights.state.is_cuda:
            torch.cuda.set_device(weights.ranks[0].state.device)  # where this process computes: the last was attached
        return weights


class DividedTensor:
    """A tensor of which every rank holds a part, or all: `tensors` and `shards` by rank."""

    def __init__(self, tensors: Sequence[Tensor], shards: Sequence[Shard | None]) -> None:
        self.tensors, self.shards = list(tensors), list(shards)
        whole = shards[0]
        self.shape = tensors[0].shape if whole is None else torch.Size(whole.shape)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def dim(self) -> int:
        """Of the whole."""
        return len(self.shape)

    @torch.no_grad()
    def detach(self) -> Tensor:
        """The whole, as a copy on the host: no GPU need have room for it."""
        return assemble((part.cpu(), shard) for part, shard in zip(self.tensors, self.shards, strict=True))

    @torch.no_grad()
    def copy_(self, whole: Tensor) -> None:
        """Write the whole into every part."""
        for part, shard in zip(self.tensors, self.shards, strict=True):
            part.copy_(whole if shard is None else shard.of(whole))


class DividedState:
    """The optimizer's area, of which every rank has its own: as one process would have it. tensors: in the optimizer's
    order."""

    def __init__(self, areas: Sequence[Tensor], tensors: Sequence[DividedTensor]) -> None:
        self.areas = list(areas)
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._parts = [tensor.shards for tensor in tensors]
        self.device, self.is_cuda = areas[0].device, areas[0].is_cuda
        self.nbytes = state_bytes(self._shapes)
        self.shape = torch.Size([self.nbytes])

    def cpu(self) -> Tensor:
        """Put together, uint8, on the host."""
        return put_together(self.areas, self._shapes, self._parts)

    def copy_(self, whole: Tensor) -> None:
        """Taken apart, into every rank's own area."""
        take_apart(whole, self.areas, self._shapes, self._parts)

    def zero_(self) -> None:
        """As before the first step."""
        for area in self.areas:
            area.zero_()


class RankHeaders(Header):
    """The headers of all ranks, as one. fields: rank 0's, but APPLYING where another rank says anything else."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self.first, *self.others = headers

    def fields(self) -> dict[str, str | int]:
        """As `Header.fields`."""
        found = self.first.fields()
        said = [(one["lineage"], one["version"], one["state"]) for one in (other.fields() for other in self.others)]
        agreed = all(one == (found["lineage"], found["version"], found["state"]) for one in said)
        return found if agreed else {**found, "state": APPLYING}

    def begin(self, fence: int) -> None:
        """As `Header.begin`; the lease is on rank 0's."""
        self.first.begin(fence)
        for other in self.others:
            other.begin(other.fence)

    def hold(self, fence: int) -> None:
        """As `Header.hold`."""
        self.first.hold(fence)
        for other in self.others:
            other.hold(other.fence)

    def finish(self, version: int) -> None:
        """As `Header.finish`."""
        for one in (*self.others, self.first):
            one.finish(version)

    def abandon(self) -> None:
        """As `Header.abandon`."""
        for one in (*self.others, self.first):
            one.abandon()

    def adopt(self, lineage: str, version: int) -> None:
        """As `Header.adopt`. For who holds the weights: rank 0's says APPLYING until all others have it."""
        for one in (*self.others, self.first):
            one.adopt(lineage, version)

    def revoke(self) -> dict[str, str | int]:
        """As `Header.revoke`, of the lease on rank 0's."""
        self.first.revoke()
        return self.fields()
