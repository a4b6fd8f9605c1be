"""Where a tensor of transformers' model lies in a parameter of the server, and which parameters are fp32.

Both sides read this: vLLM's process finds the slices, the trainer opens them.
"""

from dataclasses import dataclass

import torch

from worker.utils.shard import Shard

FLOAT32_PARAMETERS = ("A_log",)
"""Last part of the names that vLLM keeps in fp32 (0.26 to 0.33); all others are bf16."""


@dataclass(frozen=True)
class Slice:
    """Tensor `name` of transformers' text model is rows `start` to `start + rows` of the server's `param`."""

    name: str
    source: str
    """Its name in a checkpoint that this server loads."""
    param: str
    start: int
    rows: int
    shape: tuple[int, ...]
    """As it lies there."""
    dtype: str
    shard: Shard | None = None
    """Which part of the tensor this server process holds; None: all of it."""

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of `parameter` that this tensor is."""
        return parameter[self.start : self.start + self.rows].view(self.shape)
