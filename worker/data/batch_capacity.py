"""How much a trainer takes at once: the lengths of its rows, and whether a batch fits, known before there is a trainer.

Must not know: torch, versions.
Invariants: `BatchCapacity.holds` says what `Trainer.begin` would do, from lengths alone; a packed row is never longer
than the budget that memory was planned for, rounded up to the next of few lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from worker.config.hyperparameters import Hyperparameters
from worker.data.division import divided
from worker.data.examples import Example
from worker.memory.plan import Way

NARROWEST = 128
"""The shortest row of a forward pass, in tokens. Rows have few lengths, so that nothing is tuned during traffic."""


@dataclass(frozen=True)
class BatchCapacity:
    """Of one trainer: the lengths of its rows in tokens, whether it packs several sequences into one, and its way.

    by_factors: in streaming, micro-batches whose row is no longer than this go by factors. places: the most sequences
    of such a row (0: any number). parts: among how many trainers a micro-batch is divided; each takes as much.
    """

    sizes: tuple[int, ...]
    packed: bool
    way: Way
    by_factors: int = 0
    places: int = 0
    parts: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.sizes)

    @property
    def whole(self) -> bool:
        """Whether a micro-batch has to stand in one row: in streaming its graph is one forward pass, and memory for
        factors is planned for one."""
        return self.packed and self.way != "burst"

    def way_of(self, examples: Sequence[Example]) -> Way:
        """How `examples`, one micro-batch that it holds, are trained."""
        way = self.way_of_row(next((size for size in self.sizes if size >= self.needs(examples)), math.inf))
        if way == "factors" and self.places and sum(len(one.sequences) for one in examples) > self.places:
            return self.way
        return way

    def way_of_row(self, tokens: float) -> Way:
        """How a micro-batch is trained that takes a row of `tokens` tokens."""
        if self.way != "streaming" or not self.packed:
            return self.way
        return "factors" if tokens <= self.by_factors else "streaming"

    def needs(self, examples: Sequence[Example]) -> int:
        """Tokens that one row has to hold: all that are trained, or those of the longest sequence. What a teacher reads
        keeps no graph, and may take rows of its own."""
        if self.parts > 1:
            return max(replace(self, parts=1).needs(part) for part in divided(examples, self.parts))
        lengths = [len(sequence.ids) for example in examples for sequence in example.sequences]
        taught = [len(sequence.ids) for example in examples for sequence in example.teachers]
        return max([sum(lengths) if self.whole else max(lengths, default=0), *taught])

    def holds(self, examples: Sequence[Example]) -> bool:
        """Whether a trainer takes `examples` as one micro-batch."""
        return self.needs(examples) <= self.longest


def capacity_for(
    h: Hyperparameters, *, packed: bool, way: Way, budget: int | None = None, by_factors: int = 0, places: int = 0
) -> BatchCapacity:
    """The room of the trainer that `make_trainer` makes of the same arguments.

    budget: tokens of a packed row, by default `h.max_length`, at least 8,192. What was planned is the bound, whatever
    `h` says: a replay's hyper-parameters are those of another day. Rows that are padded go by `h.max_length` alone.
    """
    most = budget or max(h.max_length, 8192)
    sizes = sizes_up_to(most) if packed else widths_up_to(h.max_length)
    return BatchCapacity(sizes, packed, way, by_factors, places)


def sizes_up_to(longest: int) -> tuple[int, ...]:
    """Lengths of packed rows, in tokens: few, and none more than half empty. Powers of two, from 4,096 on with one more
    in between, and 448 below 512: many a transcript is that short, and an update costs what its row has. All are whole
    chunks of 64 tokens, as the delta net's kernels take them."""
    sizes = [256, 448, 512, 1024, 2048, 4096]
    while sizes[-1] < longest:
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return tuple(sizes[: next(i for i, size in enumerate(sizes) if size >= longest) + 1])


def widths_up_to(longest: int) -> tuple[int, ...]:
    """The row lengths, in tokens, that cover sequences of up to `longest`: powers of two from `NARROWEST`."""
    widths = [NARROWEST]
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    return tuple(widths)
