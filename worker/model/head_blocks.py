"""The output head in blocks of rows, so that no [tokens, vocabulary] array stands anywhere.

Invariant: every row is in one block, in order.
"""

from collections.abc import Iterator

from torch import Tensor

BLOCK = 1 << 27
"""Elements of one block of logits: 512 MiB in fp32, of which two stand at a time, and half of it in bf16."""


def blocks_of(weight: Tensor, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the head, so that `tokens` logits for each row are no more than BLOCK elements."""
    height = max(1, min(len(weight), BLOCK // max(tokens, 1)))
    if 128 <= height < len(weight):
        height -= height % 128  # whole tiles
    for start in range(0, len(weight), height):
        yield start, weight[start : start + height]
