"""How much device memory the trainer takes beside the server, row by row, and which way of training fits.

Arithmetic on a model's sizes and a number of tokens; what it cannot know is in the constants below, checked against
measured peaks. Must not know: torch, vLLM.

Invariants: every row is a whole number of `STEP` bytes, so that the printed rows add up to the printed total; more
tokens never need less. The peak has one of three moments: in the loss (the logits), in a layer's backward pass, or at
the embeddings' gradient; the plan's rows are those of the largest. Weights and gradients are bf16, A_log is fp32.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

from producer.errors import TandemError
from worker.memory.activations import extra, factors, saved
from worker.memory.optimizer_memory import scratch_bytes, state_bytes
from worker.memory.traced_sizes import Sizes

CONTEXT_BYTES = 1_150_000_000
"""The CUDA context, the libraries' workspaces and loaded kernels of one process: 1.11 GB were measured at 27B."""
SLACK = 0.03
"""What the allocator rounds up or cannot reuse, as a part of what comes and goes (activations, gradients in flight).
Its segments grow (`device_setup.growing_segments`): 0.01 was measured at 27B, 0.15 with segments of fixed sizes."""
BUCKET_BYTES = 1 << 30
"""Gradients that streaming holds back to apply together: `ApolloMini.streaming`'s default."""
LOSS_BLOCK = 1 << 27
"""Most logits at a time: worker.model.head_blocks's BLOCK."""
LOSS_BLOCKS = 3
"""In fp32, what stands of them: a block's logits and gradient, and those of the one before until replaced."""
TEACHER = 65 * 40
"""Bytes a token of a teacher's next words, K + 1 of them (`worker.model.soft_targets`), and of what the loss makes of
them: which they are and where (8 each), whether in this block (1), expected, found, and their parts of gradients."""
HIDDEN = 12
"""Bytes for each element of the last hidden states while the loss and its gradient are computed."""
LEAST_ROW = 512
"""Tokens of the shortest packed row; rows of a power of two from here on exist."""
SERVER_MEMORY = "a server started with a larger --trainer-memory or a smaller --gpu-memory-utilization"
"""What to do for more free memory."""
STEP = 10_000_000
"""What rows are rounded up to: the last digit that is printed."""

Way = Literal["burst", "factors", "streaming"]
"""How a micro-batch becomes a step. burst: all gradients are kept, and written in one sweep. factors: of matrices what
their gradients are products of is kept, and they are formed in the sweep. streaming: each gradient is written as
backward makes it."""
Apply = Literal["auto", "burst", "factors", "streaming"]
Recompute = Literal["auto", "always", "never"]


class MemoryPlanError(TandemError):
    """The trainer does not fit; the numbers and what to do are in the message."""


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


def make_plan(
    config: Sizes,
    tokens: int,
    *,
    way: Way,
    kept: int,
    embeddings: str = "apollo",
    optimizer: str = "apollo-mini",
    context_bytes: int = CONTEXT_BYTES,
) -> Plan:
    """The plan for forward passes of `tokens` tokens (padding included), all of them trained.

    kept: how many of the last layers keep their activations; the others are recomputed.
    embeddings: "frozen" spares the gradients of embeddings and head. optimizer: as `--optimizer`, for its state and
    scratch. context_bytes: what CUDA and its libraries are
    still to take; less in a process whose context exists before `free` is asked for.
    """
    tables = embeddings != "frozen"
    standing = _gradient_bytes(config, tables) if way == "burst" else 0
    shared = {"weights": _up(weight_bytes(config)), "state": _up(state_bytes(config, optimizer))}
    plans = []
    for name, moment in MOMENTS.items():
        gradients, activations = moment(config, tokens, way, kept, tables)
        moving = gradients + sum(size for _, size in activations)
        rows = [
            ("gradients", standing + gradients),
            *activations,
            ("optimizer's scratch", scratch_bytes(config, optimizer)),
            ("allocator's slack", SLACK * moving),
            ("CUDA context and libraries", context_bytes),
        ]
        rounded = tuple((row, _up(size)) for row, size in rows)
        plans.append(Plan(tokens, way, kept, len(config.layers), name, rows=rounded, **shared))
    return max(plans, key=lambda plan: plan.total)


def choose(
    config: Sizes,
    budget_tokens: int,
    free_bytes: int,
    apply: Apply = "auto",
    recompute: Recompute = "auto",
    *,
    embeddings: str = "apollo",
    optimizer: str = "apollo-mini",
    context_bytes: int = CONTEXT_BYTES,
    way_out: str = SERVER_MEMORY,
) -> Plan:
    """The fastest plan that fits into `free_bytes`: burst before streaming, then no recomputation before it.

    Factors are chosen where they are asked for; which of streaming's shorter rows can go by them, `longest_by_factors`
    says.

    Raises MemoryPlanError with needed, free and missing, and what to change; way_out: what would free more.
    """
    ways: list[Way] = ["burst", "streaming"] if apply == "auto" else [apply]
    every = len(config.layers)
    kept = {"auto": [every, 0], "always": [0], "never": [every]}[recompute]
    at = partial(make_plan, config, embeddings=embeddings, optimizer=optimizer, context_bytes=context_bytes)
    plans = [at(budget_tokens, way=way, kept=some) for way, some in product(ways, kept)]
    for plan in plans:
        if plan.total <= free_bytes:
            return plan.within(free_bytes)
    least = min(plans, key=lambda plan: plan.total)
    fewer = partial(at, way=least.way, kept=least.kept)
    most = bisect_right(range(1, budget_tokens + 1), free_bytes, key=lambda tokens: fewer(tokens).total)
    raise MemoryPlanError(_refusal(least, free_bytes, most, way_out))


def layers_kept(config: Sizes, tokens: int, free_bytes: int, *, way: Way, **costs: Any) -> int:
    """How many of the last layers can keep their activations in a pass of `tokens` tokens: the most that fit. costs: of
    `make_plan`."""
    at = partial(make_plan, config, tokens, way=way, **costs)
    return max((kept for kept in range(len(config.layers) + 1) if at(kept=kept).total <= free_bytes), default=0)


def longest_by_factors(config: Sizes, sizes: Sequence[int], free_bytes: int, **costs: Any) -> int:
    """The longest of `sizes`, in tokens, for whose row the factors fit into `free_bytes`, layers recomputed; 0 if none.

    They write in less time than streaming, whose writes wait for a whole backward pass, so they are taken where they
    fit. costs: of `make_plan`.
    """
    at = partial(make_plan, config, way="factors", kept=0, **costs)
    return max((size for size in sizes if at(tokens=size).total <= free_bytes), default=0)


def layers_bytes(config: Sizes, tokens: int, *, way: Way, kept: int) -> float:
    """What forward and backward of the layers alone take at their peak, and in burst all of their gradients: nothing of
    embeddings, head, loss and buffer."""
    _, activations = _backward(config, tokens, way, kept, tables=False)
    return _sum(activations) + (_gradient_bytes(config, tables=False) if way == "burst" else 0)


def weight_bytes(config: Sizes) -> int:
    """Bytes of the text model's weights as the server holds them."""
    return 2 * config.count() + 2 * config.exact


# -- the three moments: (gradients in flight, activations by name), in bytes ------------------------------------------

Moment = tuple[float, list[tuple[str, float]]]


def _loss(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """Everything the forward pass kept, one block of logits, and the head's gradient or its factors."""
    logits = 4 * LOSS_BLOCKS * min(LOSS_BLOCK, tokens * config.vocab)
    # before and after the last norm, the gathered rows and their gradient in bf16, and its sum over blocks in fp32
    hidden = HIDDEN * config.hidden * tokens
    rows = [*_held(config, tokens, kept), ("logits", logits), ("hidden states and their gradient", hidden)]
    rows.append(("a teacher's next words", TEACHER * tokens))
    if way == "factors":
        return _buffer(config, tables), [*rows, (FACTORS, _table_factors(config, tables) * tokens)]
    return (_table_bytes(config) if tables else 0), rows


def _backward(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """Everything the forward pass kept, and what the backward pass of the last layer adds to it; or, if that is more,
    of the first recomputed one, before which the kept ones have been freed. Factors grow from the last layer to the
    first while activations go, so that one of the ends is the largest.

    A tied table's gradient waits from the loss on for the embeddings' part of it.
    """
    kinds = set(config.layers)
    last = max(extra(config, kind) for kind in kinds)
    # a recomputed layer's input is one of the layer inputs already
    again = max(sum(saved(config, kind)) - 2 * config.hidden + extra(config, kind) for kind in kinds)
    first = len(config.layers) - kept
    inputs = ("layer inputs", 2 * config.hidden * first * tokens)
    moments = [[*_held(config, tokens, kept), ("one layer's backward pass", last * tokens)]] if kept else []
    if way == "factors":
        head = _table_factors(config, tables)
        moments = [[*rows, (FACTORS, head * tokens)] for rows in moments]
        done = (FACTORS, (head + _layer_factors(config, config.layers[first:])) * tokens)
        if first:
            moments.append([inputs, done, ("one layer's backward pass", again * tokens)])
        everything = (FACTORS, (head + _layer_factors(config, config.layers)) * tokens)
        moments.append([everything, ("one layer's backward pass", again * tokens)])
        return _formed(config, tables), max(moments, key=_sum)
    matrices = [2 * math.prod(shape) for kind in kinds for shape in config.layer(kind).values()]
    gradients = max(matrices) + (_table_bytes(config) if tables and config.tied else 0)
    gradients += _bucket(config) if way == "streaming" else 0
    if first:
        moments.append([inputs, ("one layer's backward pass", again * tokens)])
    return gradients, max(moments, key=_sum)


def _embeddings(config: Sizes, tokens: int, way: Way, kept: int, tables: bool) -> Moment:
    """The table's gradient; tied, that of the head beside it. The layers are done, and nothing of them is left but
    factors."""
    rows: list[tuple[str, float]] = [("hidden states and their gradient", HIDDEN * config.hidden * tokens)]
    if way == "factors":
        everything = _table_factors(config, tables) + _layer_factors(config, config.layers)
        return _formed(config, tables), [*rows, (FACTORS, everything * tokens)]
    table = _table_bytes(config) * (2 if config.tied else 1) if tables else 0
    return table + (_bucket(config) if way == "streaming" else 0), rows


MOMENTS = {"in the loss": _loss, "in a layer's backward pass": _backward, "at the embeddings": _embeddings}


def _held(config: Sizes, tokens: int, kept: int) -> list[tuple[str, float]]:
    """What the forward pass leaves for backward."""
    again = len(config.layers) - kept
    each = {kind: sum(saved(config, kind)) for kind in set(config.layers)}
    rows: list[tuple[str, float]] = []
    if again:
        rows.append(("layer inputs", 2 * config.hidden * again * tokens))
    if kept:
        rows.append((f"activations of {kept} layers", sum(each[kind] for kind in config.layers[again:]) * tokens))
    return rows


FACTORS = "factors of the matrices' gradients"


def _layer_factors(config: Sizes, layers: Sequence[str]) -> int:
    """Bytes a token of these layers' factors."""
    each = {kind: factors(config, kind) for kind in set(layers)}
    return sum(each[kind] for kind in layers)


def _table_factors(config: Sizes, tables: bool) -> int:
    """Bytes a token: the head's input and the gradient of its logits, and the gradient of the embeddings' rows."""
    return 2 * (config.vocab + 2 * config.hidden) if tables else 0


def _buffer(config: Sizes, tables: bool) -> int:
    """Where products are formed: a bucket of them, or the largest matrix."""
    matrices = [2 * math.prod(shape) for kind in set(config.layers) for shape in config.layer(kind).values()]
    return max(_bucket(config), *matrices, _table_bytes(config) if tables else 0)


def _formed(config: Sizes, tables: bool) -> int:
    """Gradients by factors, once the layers are done: the buffer, and those of experts, which have no factors."""
    return _buffer(config, tables) + 2 * config.stacks()


def _sum(rows: list[tuple[str, float]]) -> float:
    return sum(size for _, size in rows)


# -- small parts ------------------------------------------------------------------------------------------------------


def _table_bytes(config: Sizes) -> int:
    return 2 * config.vocab * config.hidden


def _gradient_bytes(config: Sizes, tables: bool) -> int:
    return 2 * config.count() - (0 if tables else _table_bytes(config) * len(config.tables()))


def _bucket(config: Sizes) -> int:
    return min(BUCKET_BYTES, 2 * config.count() - _table_bytes(config) * len(config.tables()))


def _up(size: float) -> int:
    return math.ceil(size / STEP) * STEP


def gigabytes(size: float) -> str:
    """`size` bytes in GB of 10^9, to two decimals."""
    return f"{size / 1e9:,.2f} GB"


def _line(name: str, size: int) -> str:
    return f"  {name:<38}{gigabytes(size):>12}"


def _refusal(plan: Plan, free: int, most: int, way_out: str) -> str:
    free = free // STEP * STEP
    row = 1 << most.bit_length() - 1 if most >= LEAST_ROW else 0
    changes = [f"a smaller --max-tokens and --max-length ({row:,} tokens would fit)"] if row else []
    changes += [] if plan.way == "streaming" else ["--apply streaming"]
    changes += [] if plan.recompute else ["recomputed layers"]
    changes.append(way_out)
    return (
        f"the trainer needs {gigabytes(plan.total)} ({plan.title()}) and {gigabytes(free)} are free: "
        f"{gigabytes(plan.total - free)} short. Use {', or '.join(changes)}"
    )
