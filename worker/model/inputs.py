"""A batch -> the keyword arguments of the model's forward; for packed rows, where each sequence begins.

Invariants: every layer of one forward pass gets the same tensor objects (fla caches what it derives from them by
identity; another object would cost a wait for the device in every layer). For a number of sequences up to `PLACES`, the
shapes of all arguments follow from the row's length alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.data.packing import Batch

PLACES = 16
"""Sequences of a packed row, padding included, up to which its arguments have one shape: rows with more have twice as
many places, and so on."""
CHUNK = 64
"""Tokens of one chunk of fla's kernels."""
NO_MASKS = {"full_attention": None, "sliding_attention": None, "linear_attention": None}
"""A mapping keeps transformers from making masks: the kernels know where sequences end."""


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row begin, for P places. Those not taken are empty, and so is one more at the
    end: kernels write nothing for them.
    """

    starts: torch.Tensor
    """int64 [P + 2], from 0 to T; for fla."""
    starts32: torch.Tensor
    """int32 [P + 2], for attention."""
    chunks: torch.Tensor
    """int64 [C, 2]: (sequence, chunk in it) of every chunk, for fla; C is the most that P sequences in T tokens can
    have, and what is over is of the last, empty sequence."""
    longest: int
    """Tokens of the longest sequence, or more."""

    @property
    def places(self) -> int:
        """P."""
        return len(self.starts) - 2

    def to(self, device: torch.device) -> "Packing":
        """The same, there."""
        return Packing(self.starts.to(device), self.starts32.to(device), self.chunks.to(device), self.longest)


def packing_of(lengths: Sequence[int]) -> Packing:
    """Of sequences of `lengths` tokens in this order, on the host."""
    tokens, places = sum(lengths), PLACES
    while places < len(lengths):
        places *= 2
    starts, chunks = [0], []
    for number, length in enumerate(lengths):
        starts.append(starts[-1] + length)
        chunks += [(number, chunk) for chunk in range(-(-length // CHUNK))]
    starts += [tokens] * (places + 2 - len(starts))
    most = (tokens + (CHUNK - 1) * places) // CHUNK
    chunks += [(places, 0)] * (most - len(chunks))
    whole = torch.tensor(starts)
    return Packing(whole, whole.int(), torch.tensor(chunks), max(lengths))


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Arguments of the text model. A packed batch needs a model that was fused (`worker.model.patch`)."""
    ids = batch.input_ids.to(device)  # [B, T]
    if not batch.packed:
        return {"input_ids": ids}
    ends = batch.lengths.cumsum(0)  # [S]
    # Positions count from 0 in each sequence.
    positions = torch.arange(ids.shape[1]) - (ends - batch.lengths).repeat_interleave(batch.lengths)  # [T]
    return {
        "input_ids": ids,
        "position_ids": positions[None].to(device),  # [1, T]
        "attention_mask": NO_MASKS,
        "packing": packing_of(batch.lengths.tolist()).to(device),
    }
