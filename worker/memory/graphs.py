"""Which short rows are replayed as CUDA graphs, and the memory that these hold for good.

A row is worth it while the host takes longer to launch a layer's kernels than the device to run them. Its graphs own
what the layers take (`worker.trainer.captured_row`), whether a row is being replayed or not, so that they are taken
only where that much is free beside the longest row. Where it is not, they lend it to the inputs of long rows' layers,
which are computed again and never beside a replay. Must not know: torch, vLLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from worker.memory.peak_moments import input_bytes, layers_bytes
from worker.memory.plan import Way, rounded_up
from worker.memory.planner import SLACK, make_plan
from worker.memory.traced_sizes import Sizes, has_been_captured

LONGEST = 2048
"""Tokens of the longest row that is captured."""
LEAST = 512
"""Tokens: where there are longer rows, no memory is held for shorter ones alone; a transcript of some length would find
none."""
HOST_BOUND = 1 << 38
"""Tokens times parameters of a layer up to which the device waits for the host: 512 tokens at 27B, whose step took 2.6
times as long launched as replayed on an H100; 2,048 at 0.8B and 4B."""
GRAPH_BYTES = 100_000_000
"""CUDA's own of the graphs, beside what torch allocated for them."""


@dataclass(frozen=True)
class Graphs:
    """rows: their sizes in tokens, ascending; kept: layers of them that are not recomputed; held: bytes that the graphs
    hold together; total: the trainer's whole peak with them, in bytes; lent: bytes of `held` that long rows use. Then
    a short row goes by factors as a replay alone: launched, its own would not fit beside the graphs."""

    rows: tuple[int, ...] = ()
    kept: int = 0
    held: int = 0
    total: int = 0
    lent: int = 0


NO_GRAPHS = Graphs()


def host_bound(config: Sizes, sizes: Sequence[int]) -> list[int]:
    """Those of `sizes`, in tokens, whose rows wait for the host."""
    shapes = [config.layer(kind).values() for kind in config.layers]
    layer = sum(math.prod(shape) for layer in shapes for shape in layer) / len(shapes)
    return [size for size in sizes if size <= LONGEST and size * layer <= HOST_BOUND]


def held_bytes(config: Sizes, tokens: int, *, way: Way, kept: int) -> int:
    """What the graphs of rows of up to `tokens` tokens hold: shorter rows use the memory of the longest."""
    return rounded_up(layers_bytes(config, tokens, way=way, kept=kept) * (1 + SLACK) + GRAPH_BYTES)


def graphs_beside(
    config: Sizes,
    sizes: Sequence[int],
    free_bytes: int,
    *,
    way: Way,
    by_factors: bool,
    **costs: Any,
) -> Graphs:
    """The graphs that fit into `free_bytes` with a trainer by `way` of rows of `sizes`: those that lend nothing before
    those that do, the longest rows first, then no recomputation before it. by_factors: in streaming, short rows go by
    factors where they fit. costs: of `make_plan`."""
    if not has_been_captured(config):
        return NO_GRAPHS  # nobody has captured a row of it
    if way == "streaming" and not by_factors:
        return NO_GRAPHS
    short: Way = "factors" if way == "streaming" else way
    longest = partial(make_plan, config, max(sizes), way=way, kept=0, **costs)
    rows = host_bound(config, sorted(sizes))
    choices = [
        (row, kept) for row in reversed(rows) if row >= min(LEAST, max(sizes)) for kept in (len(config.layers), 0)
    ]
    for lends in (False, True) if way == "streaming" and not costs.get("group_bytes") else (False,):
        for row, kept in choices:
            held = held_bytes(config, row, way=short, kept=kept)
            lent = min(held - GRAPH_BYTES, input_bytes(config, max(sizes))) if lends else 0
            # Launched as well: in the warm-up, before there are graphs; and if they lend nothing, where it has more
            # sequences than its graphs have places.
            launched = make_plan(config, row, way=short, kept=kept, **costs).total
            total = max(longest(lent=lent).total + held, launched + (0 if lends else held))
            if total <= free_bytes:
                return Graphs(tuple(size for size in rows if size <= row), kept, held, total, lent)
    return NO_GRAPHS
