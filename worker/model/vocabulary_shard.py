"""A vocabulary that is divided over processes: looking words up, and the sums of a loss over all of its rows.

Each process has rows `first` and following of the table and of the output head. A word that lies elsewhere is nothing
here: its embedding is zero and its logit is not seen, and the sum over the processes makes both whole.

Must not know: the optimizer, examples.
Invariants: what a sum gives is the same, bit for bit, on each process; the gradient of a row of the table is complete
where the row lies.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.model.shard_group import ShardGroup


@dataclass(frozen=True)
class VocabularyShard:
    """Rows `first` to `first + rows` of `words`."""

    first: int
    rows: int
    words: int
    shards: ShardGroup

    def local(self, ids: Tensor) -> Tensor:
        """Row numbers here of the words `ids`; below 0, or `rows` and more, for those that lie elsewhere."""
        return ids - self.first

    def log_sum_exp(self, parts: Tensor) -> Tensor:
        """That of all rows, from that of the rows here, [N]."""
        highest = self.shards.highest(parts)
        return highest + self.shards.total((parts - highest).exp()).log()

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes, without a gradient."""
        return self.shards.total(part)

    def whole(self, logits: Tensor) -> Tensor:
        """Those of all words, [N, words], from those of the words here, [N, rows]; without a gradient."""
        every = logits.new_zeros(len(logits), self.words)
        every[:, self.first : self.first + self.rows] = logits
        return self.shards.total(every)

    def most_likely(self, values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest of all processes' `values` [M, <= count], and their words; ids: of `values`, as numbered
        here."""
        short = count - values.shape[1]
        values = functional.pad(values, (0, short), value=-torch.inf)
        ids = functional.pad(ids + self.first, (0, short))
        every, words = (torch.cat(self.shards.gathered(part), 1) for part in (values, ids))
        best, chosen = every.topk(count, 1)
        return best, words.gather(1, chosen)


def divide_table(table: torch.nn.Embedding, vocabulary: VocabularyShard, padding: int | None) -> None:
    """Make `table`, which holds the rows of `vocabulary`, look up words of the whole one. padding: a word without a
    gradient."""
    known = padding is not None and 0 <= vocabulary.local(torch.tensor(padding)) < vocabulary.rows
    table.padding_idx = padding - vocabulary.first if known and padding is not None else None

    def forward(module: Any, ids: Tensor) -> Tensor:
        places = vocabulary.local(ids)
        inside = (places >= 0) & (places < vocabulary.rows)
        found = functional.embedding(places.clamp(0, vocabulary.rows - 1), module.weight, module.padding_idx)
        return vocabulary.shards.summed(found.masked_fill(~inside[..., None], 0))

    table.forward = MethodType(forward, table)  # type: ignore[method-assign]
