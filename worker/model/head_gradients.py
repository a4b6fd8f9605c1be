"""The gradients of hidden states and head, from those of the logits, block by block.

    gradients = HeadGradients(hidden, weight, wanted, keep, vocabulary)
    gradients.add(d_logits, block, start)        # for each block of the head's rows, in order
    gradients.of_hidden(), gradients.of_weight

Must not know: examples, the optimizer.
Invariants: what nobody asked for is not computed; the head's gradient is rounded once, and the hidden states' is added
up in fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.model.vocabulary_shard import VocabularyShard

Keep = Callable[[Tensor, Tensor, int], None]
"""Takes the gradient of a block of logits [N, B], the hidden states [N, H], and the block's first row of the head."""


class HeadGradients:
    """hidden: [N, H]; weight: [V, H]; wanted: whether those of hidden and of weight are; keep: gets what the head's is
    the product of, in its place."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        wanted: Sequence[bool],
        keep: Keep | None,
        vocabulary: VocabularyShard | None,
    ) -> None:
        self._hidden, self._keep, self._vocabulary = hidden, keep, vocabulary
        self._sum = torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None  # [N, H]
        self.of_weight = torch.empty_like(weight) if wanted[1] and keep is None else None  # [V, H]

    def add(self, d_logits: Tensor, block: Tensor, start: int) -> None:
        """d_logits: [N, B], of the head's rows `block` [B, H] from row `start` on."""
        if self._sum is not None:
            self._sum += d_logits @ block
        if self.of_weight is not None:
            torch.mm(d_logits.T, self._hidden, out=self.of_weight[start : start + len(block)])
        elif self._keep is not None:
            self._keep(d_logits, self._hidden, start)

    def of_hidden(self) -> Tensor | None:
        """Once, after the last block: [N, H], over all processes that share the vocabulary."""
        if self._sum is None:
            return None
        whole = self._sum if self._vocabulary is None else self._vocabulary.total(self._sum)
        return whole.to(self._hidden.dtype)
