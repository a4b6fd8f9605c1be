"""A batch -> the keyword arguments of the model's forward; for packed rows, where each sequence begins.

Invariant: every layer of one forward pass gets the same tensor objects (fla caches what it derives from them by
identity; another object would cost a wait for the device in every layer).
"""

from dataclasses import dataclass
from typing import Any

import torch

from worker.data.packing import Batch


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row begin, and where the last one ends: [S + 1], from 0 to T."""

    starts: torch.Tensor
    """int64, for fla."""
    starts32: torch.Tensor
    """int32, for attention."""
    longest: int
    """Tokens of the longest sequence."""


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Arguments of the text model. A packed batch needs a model that was fused (`worker.model.patch`)."""
    ids = batch.input_ids.to(device)  # [B, T]
    if not batch.packed:
        return {"input_ids": ids}
    ends = batch.lengths.cumsum(0)  # [S]
    starts = torch.cat([ends.new_zeros(1), ends])  # [S + 1]
    # Positions count from 0 in each sequence.
    positions = torch.arange(ids.shape[1]) - starts[:-1].repeat_interleave(batch.lengths)  # [T]
    packing = Packing(
        starts=starts.to(device),
        starts32=starts.to(device, torch.int32),
        longest=int(batch.lengths.max()),
    )
    return {
        "input_ids": ids,
        "position_ids": positions[None].to(device),  # [1, T]
        # A mapping keeps transformers from making masks: the kernels know where sequences end.
        "attention_mask": {"full_attention": None, "linear_attention": None},
        "packing": packing,
    }
