"""The output head in blocks of rows, so that no array of all tokens and words stands anywhere, where it is larger than
one block; and what follows the head's product.

Invariant: every row is in one block, in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

BLOCK = 1 << 27
"""Elements of one block of logits: 512 MiB in fp32, of which two stand at a time, and half of it in bf16."""


@dataclass(frozen=True)
class After:
    """What a model does to z = hidden @ weight^T [N, V]: first z + bias, then times `scale`, then cap * tanh(z /
    cap)."""

    scale: float = 1.0
    cap: float | None = None
    bias: Tensor | None = None
    """[V], of the weight's dtype."""

    @property
    def is_nothing(self) -> bool:
        """Whether z are the logits."""
        return self.scale == 1.0 and self.cap is None and self.bias is None

    def slope(self, logits: Tensor) -> Tensor | None:
        """By how much the cap flattens what lies below `logits`, which are capped: fp32, of their shape; None: not."""
        return None if self.cap is None else 1 - (logits / self.cap).square_()


PLAIN = After()


def blocks_of(weight: Tensor, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of the head, so that `tokens` logits for each row are no more than BLOCK elements."""
    height = max(1, min(len(weight), BLOCK // max(tokens, 1)))
    if 128 <= height < len(weight):
        height -= height % 128  # whole tiles
    for start in range(0, len(weight), height):
        yield start, weight[start : start + height]


def logits_of(hidden: Tensor, block: Tensor, start: int, after: After) -> Tensor:
    """Those of the head's rows `block` [B, H] from row `start` on, fp32 [N, B], for hidden [N, H]."""
    logits = (hidden @ block.T).float()
    if after.bias is not None:
        logits += after.bias[start : start + len(block)].float()
    if after.scale != 1.0:
        logits *= after.scale
    if after.cap is not None:
        logits.div_(after.cap).tanh_().mul_(after.cap)
    return logits
