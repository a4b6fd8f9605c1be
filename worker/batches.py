"""Examples -> rectangular batches of a few fixed shapes, rows padded on the right.

Must not know: tokenizers, models, Redis, vLLM.
Invariants: every sequence stands in exactly one row, whole, from column 0; a row holds one sequence, so that nothing
leaks between examples (causal attention and the gated delta net never look to the right, where the padding is; packing
several sequences into a row does leak through transformers' delta net on a CPU). Shapes are (a power of two, one of
`widths`): a function compiled or tuned for one of them is seldom compiled again. The order depends on the input alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from producer.errors import TandemError
from worker.examples import Example, TokenSequence


class BatchError(TandemError):
    """A sequence fits into no row, or the widths and the budget contradict each other."""


@dataclass
class Batch:
    """B rows of T tokens. A padding row has no trained token, weight 0, length 0 and example -1."""

    input_ids: torch.Tensor
    """int64 [B, T], the pad token after each row's end."""
    mask: torch.Tensor
    """bool [B, T]: the token at t is trained; the model predicts it at t - 1. Column 0 is False."""
    weights: torch.Tensor
    """fp32 [B]: the weight of the row's example."""
    examples: torch.Tensor
    """int64 [B]: index into the examples given; several rows may name the same one."""
    lengths: torch.Tensor
    """int64 [B]: tokens before the padding."""


def make_batches(examples: Sequence[Example], *, pad_id: int, widths: Sequence[int], budget: int) -> list[Batch]:
    """Batches that hold every sequence of `examples` once, B * T <= `budget` tokens each, narrow ones first.

    A row's width is the least of `widths` that holds its sequence. Raises BatchError.
    """
    widths = sorted(set(widths))
    if not widths or widths[0] < 1 or budget < widths[-1]:
        raise BatchError(f"the budget of {budget} tokens must hold a row of each width {tuple(widths)}")
    by_width: dict[int, list[tuple[int, TokenSequence]]] = {width: [] for width in widths}
    for index, example in enumerate(examples):
        for sequence in example.sequences:
            width = next((width for width in widths if len(sequence.ids) <= width), None)
            if width is None:
                raise BatchError(
                    f"a sequence of {len(sequence.ids)} tokens is wider than the widest row, {widths[-1]}: "
                    "build examples with max_tokens no higher than that"
                )
            by_width[width].append((index, sequence))
    batches = []
    for width, rows in by_width.items():
        most = 1 << ((budget // width).bit_length() - 1)  # the largest power of two that fits
        for start in range(0, len(rows), most):
            batches.append(_batch(rows[start : start + most], examples, width, pad_id))
    return batches


def _batch(rows: list[tuple[int, TokenSequence]], examples: Sequence[Example], width: int, pad_id: int) -> Batch:
    height = 1 << (len(rows) - 1).bit_length()  # the next power of two
    batch = Batch(
        input_ids=torch.full((height, width), pad_id, dtype=torch.int64),
        mask=torch.zeros((height, width), dtype=torch.bool),
        weights=torch.zeros(height, dtype=torch.float32),
        examples=torch.full((height,), -1, dtype=torch.int64),
        lengths=torch.zeros(height, dtype=torch.int64),
    )
    for row, (index, sequence) in enumerate(rows):
        length = len(sequence.ids)
        batch.input_ids[row, :length] = torch.tensor(sequence.ids)
        batch.mask[row, :length] = torch.tensor(sequence.mask)
        batch.weights[row] = examples[index].weight
        batch.examples[row] = index
        batch.lengths[row] = length
    return batch
