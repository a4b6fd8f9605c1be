"""A plan: what the trainer takes at its peak, row by row, as numbers and in words.

What the numbers are, `planner` decides. Must not know: torch, vLLM.
Invariant: every row is a whole number of `STEP` bytes, so that the printed rows add up to the printed total.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

STEP = 10_000_000
"""What rows are rounded up to: the last digit that is printed."""

Way = Literal["burst", "factors", "streaming"]
"""How a micro-batch becomes a step. burst: all gradients are kept, and written in one sweep. factors: of matrices what
their gradients are products of is kept, and they are formed in the sweep. streaming: each gradient is written as
backward makes it."""
Apply = Literal["auto", "burst", "factors", "streaming"]
Recompute = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Plan:
    """Bytes. `rows` are the trainer's own at its peak; `weights` and `state` lie in the server's memory."""

    tokens: int
    way: Way
    kept: int
    """How many of the last layers keep their activations; the others keep their input and are computed again."""
    layers: int
    moment: str
    weights: int
    state: int
    rows: tuple[tuple[str, int], ...]
    free: int | None = None
    """What the trainer may take, rounded down; None where nobody asked the device."""
    replayed: int = 0
    """Tokens of the longest row that is replayed as CUDA graphs."""

    @property
    def recompute(self) -> bool:
        """Whether any layer is computed again in backward."""
        return self.kept < self.layers

    @property
    def total(self) -> int:
        """The trainer's own peak, its CUDA context included."""
        return sum(size for _, size in self.rows)

    def with_graphs(self, held: int, rows: Sequence[int]) -> "Plan":
        """The same beside graphs of `rows`, in tokens, that hold `held` bytes."""
        return replace(self, rows=(*self.rows, ("graphs of short rows", held)), replayed=max(rows, default=0))

    def within(self, free_bytes: int) -> "Plan":
        """The same, told how much there is."""
        return replace(self, free=free_bytes // STEP * STEP)

    def title(self) -> str:
        """What was chosen, in words."""
        layers = f"{self.layers - self.kept} of {self.layers} layers recomputed" if self.kept else "layers recomputed"
        layers = layers if self.recompute else "no recomputation"
        graphs = f", rows of up to {self.replayed:,} tokens replayed as CUDA graphs" if self.replayed else ""
        return f"{self.way}, {layers}, {self.tokens:,} tokens a pass{graphs}"

    def render(self, device_bytes: int | None = None) -> list[str]:
        """The plan as lines for a log, in GB of 10^9 bytes. device_bytes: the device's memory; with it the server's
        share (KV cache, graphs and the rest beside weights and state) is a row too, and all rows add up to it."""
        server = [("weights (shared, the server's)", self.weights), ("optimizer's state (the server's)", self.state)]
        if device_bytes is not None and self.free is not None:
            whole = device_bytes // STEP * STEP
            rest = whole - self.free - self.weights - self.state
            server.append(("KV cache and whatever else is in use", rest))
        lines = [f"memory plan: {self.title()}; its peak is {self.moment}"]
        lines += [_line(*row) for row in server]
        lines += [_line(*row) for row in self.rows if row[1]]
        lines.append(_line("the trainer's own, total", self.total))
        if self.free is not None:
            lines += [_line("free for it", self.free), _line("left", self.free - self.total)]
        return lines


def rounded_up(size: float) -> int:
    """`size` bytes as a row has them."""
    return math.ceil(size / STEP) * STEP


def gigabytes(size: float) -> str:
    """`size` bytes in GB of 10^9, to two decimals."""
    return f"{size / 1e9:,.2f} GB"


def _line(name: str, size: int) -> str:
    return f"  {name:<38}{gigabytes(size):>12}"
