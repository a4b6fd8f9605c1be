"""How much device memory the trainer takes beside the server, and which way of training fits.

A plan is made for each of the moments that can be the peak (`peak_moments`); the largest is the trainer's. Must not
know: torch, vLLM.

Invariant: more tokens never need less.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from producer.errors import TandemError
from worker.memory.divided import COPIES
from worker.memory.optimizer_memory import scratch_bytes, state_bytes
from worker.memory.peak_moments import INPUTS, MOMENTS, gradient_bytes
from worker.memory.plan import STEP, Apply, Plan, Recompute, Way, gigabytes, rounded_up
from worker.memory.traced_sizes import Sizes

CONTEXT_BYTES = 1_150_000_000
"""The CUDA context, the libraries' workspaces and loaded kernels of one process: 1.11 GB were measured at 27B."""
SLACK = 0.03
"""What the allocator rounds up or cannot reuse, as a part of what comes and goes (activations, gradients in flight).
Its segments grow (`device_setup.growing_segments`): 0.01 was measured at 27B, 0.15 with segments of fixed sizes."""
GROUP = "NCCL, and other ranks' processes"
"""A row's name."""
LEAST_ROW = 256
"""Tokens of the shortest packed row; rows of a power of two from here on exist."""
SERVER_MEMORY = "a server started with a larger --trainer-memory or a smaller --gpu-memory-utilization"
"""What to do for more free memory."""


class MemoryPlanError(TandemError):
    """The trainer does not fit; the numbers and what to do are in the message."""


def make_plan(
    config: Sizes,
    tokens: int,
    *,
    way: Way,
    kept: int,
    embeddings: str = "apollo",
    optimizer: str = "apollo-mini",
    context_bytes: int = CONTEXT_BYTES,
    ranks: int = 1,
    group_bytes: int = 0,
    lent: int = 0,
) -> Plan:
    """The plan for forward passes of `tokens` tokens (padding included), all of them trained.

    kept: how many of the last layers keep their activations; the others are recomputed.
    embeddings: "frozen" spares the gradients of embeddings and head. optimizer: as `--optimizer`, for its state and
    scratch. context_bytes: what CUDA and its libraries are still to take; less in a process whose context exists before
    `free` is asked for. ranks: of how many `config` is one part. group_bytes: what a group of processes is still to
    take beside (NCCL). lent: bytes for layers' inputs that somebody else holds (`worker.model.lent_memory`).
    """
    tables = embeddings != "frozen"
    standing = gradient_bytes(config, tables) if way == "burst" else 0
    shared = {"weights": rounded_up(weight_bytes(config)), "state": rounded_up(state_bytes(config, optimizer))}
    plans = []
    for name, moment in MOMENTS.items():
        gradients, every = moment(config, tokens, way, kept, tables)
        activations = [(row, max(0.0, size - lent) if row == INPUTS else size) for row, size in every]
        moving = gradients + sum(size for _, size in activations)
        rows = [
            ("gradients", standing + gradients),
            *activations,
            ("optimizer's scratch", scratch_bytes(config, optimizer)),
            ("allocator's slack", SLACK * moving),
            ("CUDA context and libraries", context_bytes),
            *([("copies that are added up over ranks", COPIES * config.hidden * tokens)] if ranks > 1 else []),
            *([(GROUP, group_bytes)] if group_bytes else []),
        ]
        rounded = tuple((row, rounded_up(size)) for row, size in rows)
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
    ranks: int = 1,
    group_bytes: int = 0,
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
    at = partial(
        make_plan, config, embeddings=embeddings, optimizer=optimizer, context_bytes=context_bytes, ranks=ranks,
        group_bytes=group_bytes,
    )  # fmt: skip
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


def within_longest(planned: Mapping[int, int]) -> tuple[int, ...]:
    """planned: the bytes of rows, by their tokens. Those rows, in tokens, that take no more than the longest one. A
    shorter one may take more, since more of its layers keep their activations."""
    return tuple(tokens for tokens, total in planned.items() if total <= planned[max(planned)])


def longest_by_factors(config: Sizes, sizes: Sequence[int], free_bytes: int, **costs: Any) -> int:
    """The longest of `sizes`, in tokens, for whose row the factors fit into `free_bytes`, layers recomputed; 0 if none.

    They write in less time than streaming, whose writes wait for a whole backward pass, so they are taken where they
    fit. costs: of `make_plan`.
    """
    at = partial(make_plan, config, way="factors", kept=0, **costs)
    return max((size for size in sizes if at(tokens=size).total <= free_bytes), default=0)


def weight_bytes(config: Sizes) -> int:
    """Bytes of the text model's weights as the server holds them."""
    return 2 * config.count() + 2 * config.exact


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
