"""What a GPU needs between attaching and training: a memory plan, the kernels, and every shape run once.

    with growing_segments():                                          # around the first allocation
    keep_within(settings, device)                                     # to what --memory says
    chosen = choose_way(model, path, h, settings, max_tokens, device)    # logs the plan; fuses the model
    room = room_of(settings, devices, group_bytes)                    # of a model that is divided over `devices`
    chosen = choose_way(..., divided=Divided(len(devices), room))     # the same on every rank
    warm(trainer, chosen)                                             # says how far it is; logs what it cost

On a CPU there is nothing to plan, and transformers' own code runs as it is, with an attention that knows all that the
model's layers ask for. Must not know: Redis, the header, versions.
Invariants: what does not fit is refused here, with numbers, before anything is trained; with --memory torch's part of
this process is held to it, and CUDA's own is taken to be CONTEXT_BYTES.
"""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from producer.progress import progress
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.data.batch_capacity import sizes_up_to
from worker.memory.divided import divided as part_of
from worker.memory.graphs import NO_GRAPHS, Graphs, graphs_beside
from worker.memory.plan import Plan, Way, gigabytes
from worker.memory.planner import (
    CONTEXT_BYTES,
    SERVER_MEMORY,
    MemoryPlanError,
    choose,
    layers_kept,
    longest_by_factors,
    make_plan,
    within_longest,
)
from worker.memory.traced_sizes import NOT_SEEN, Sizes, has_been_captured, has_run
from worker.model import fuse, settle_attention
from worker.model.inputs import PLACES
from worker.model.layer_trace import sizes_of
from worker.trainer.captured_rows import rows_of
from worker.trainer.kernel_warmup import warm_up
from worker.trainer.parallel_compile import Compiled, parallel_compile
from worker.trainer.trainer import Trainer
from worker.trainer.tuned_kernels import Tuned, card_of, shipped_table, tuned_kernels

log = logging.getLogger("tandem")

LIBRARIES_BYTES = 650_000_000
"""What CUDA's libraries still take in this process; its context exists when free memory is asked for."""
ALLOCATOR_ENV = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Chosen:
    """How gradients are applied, and the most tokens of one forward pass (None: the trainer's default).

    by_factors: in streaming, rows of up to so many tokens go by factors. replayed: rows of which CUDA graphs are made.
    lent: bytes of these that long rows use. places: the most sequences of a row that goes by factors (0: any number).
    within_longest: rows for which no more memory is planned than for the longest one.
    """

    way: Way
    budget: int | None = None
    by_factors: int = 0
    replayed: tuple[int, ...] = ()
    lent: int = 0
    places: int = 0
    within_longest: tuple[int, ...] = ()


@dataclass(frozen=True)
class Divided:
    """Of a model that is divided over `ranks`: what the trainer of each may take in bytes (`room_of`)."""

    ranks: int
    room: int


@contextmanager
def growing_segments() -> Iterator[None]:
    """Have torch's CUDA allocator grow one mapping instead of collecting blocks of many sizes, unless the user has said
    something of it. Rows of several lengths would leave holes that none of the others fits.

    torch reads the setting once, with the first allocation on a GPU, which has to be in the block. Afterwards it is
    gone from the environment: such memory cannot be shared by CUDA IPC, so no server may inherit it. A trainer may
    have it, which only opens.
    """
    if any(name in os.environ for name in ALLOCATOR_ENV):
        yield
        return
    os.environ[ALLOCATOR_ENV[-1]] = "expandable_segments:True"
    try:
        yield
    finally:
        del os.environ[ALLOCATOR_ENV[-1]]


def choose_way(
    model: Any,
    model_path: Path,
    h: Hyperparameters,
    settings: ApplySettings,
    max_tokens: int,
    device: torch.device,
    *,
    group_bytes: int = 0,
    divided: Divided | None = None,
) -> Chosen:
    """Plan the memory, prepare `model` (transformers', on the shared weights), and say which way fits.

    max_tokens: most tokens of a version, as the queue collects them. group_bytes: what NCCL is still to take, where
    gradients of several replicas are added up. divided: `model` is one rank's; all ranks have to come to the same plan,
    which says what is computed again, and so which sums there are. Raises MemoryPlanError, ModelError, AttentionError,
    ConfigError.
    """
    if device.type == "cpu":
        settle_attention(model)
        return Chosen("burst" if settings.apply == "auto" else settings.apply)
    config = sizes_of(model_path)
    sizes = sizes_up_to(max(max_tokens, h.max_length))
    budget = sizes[-1]
    free, whole = torch.cuda.mem_get_info(device)
    may = room_of(settings, [device], 0) if divided is None else divided.room
    way_out = "a larger --memory" if settings.memory and may < free else SERVER_MEMORY
    costs: dict[str, Any] = {"embeddings": h.embeddings, "optimizer": h.rule, "context_bytes": LIBRARIES_BYTES}
    costs["group_bytes"] = group_bytes
    if divided is not None:
        config, costs["ranks"] = part_of(config, divided.ranks), divided.ranks
    plan = choose(config, budget, may, settings.apply, way_out=way_out, **costs)

    mixed = settings.apply == "auto" and plan.way == "streaming" and divided is None
    graphs = NO_GRAPHS
    if settings.graphs == "auto" and divided is None:
        graphs = graphs_beside(config, sizes, may, way=plan.way, by_factors=mixed, **costs)
    rest = may - graphs.held
    costs["lent"] = graphs.lent
    by_factors = longest_by_factors(config, sizes, rest, **costs) if mixed else 0
    places = 0
    if graphs.lent:  # launched, these rows' factors would stand beside the graphs
        by_factors, places = graphs.rows[-1], PLACES - 1

    def way_of(tokens: int) -> Way:
        return "factors" if tokens <= by_factors else plan.way

    rows, beside = rows_of(model), cache(partial(layers_kept, config, free_bytes=rest, **costs))

    def kept(tokens: int) -> int:
        if tokens in graphs.rows and (rows.capturing or not graphs.lent):
            return graphs.kept
        return beside(tokens, way=way_of(tokens))

    def plan_of(tokens: int) -> Plan:
        return make_plan(config, tokens, way=way_of(tokens), kept=kept(tokens), **costs)

    for tokens in [budget, *([by_factors] if 0 < by_factors < budget and not graphs.lent else [])]:
        shown = plan_of(tokens)
        if graphs.rows:
            shown = shown.with_graphs(graphs.held, graphs.rows)
        for line in shown.within(may).render(whole):
            log.info(line)
    if divided is None:
        _say(config, by_factors, graphs, wanted=settings.graphs == "auto")
    fuse(model, kept)
    shorter = within_longest({size: plan_of(size).total for size in sizes})
    return Chosen(plan.way, budget, by_factors, graphs.rows, graphs.lent, places, shorter)


def room_of(settings: ApplySettings, devices: Sequence[torch.device], group_bytes: int) -> int:
    """Bytes that this process, or the ranks on `devices` each, may still take: what is free on the fullest device, and
    no more than --memory. group_bytes: what of --memory NCCL and other ranks' processes have taken already."""
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    if not settings.memory:
        return free
    taken = CONTEXT_BYTES - LIBRARIES_BYTES + group_bytes  # the context is there
    return min(free, max(0, int(settings.memory * 1e9) - taken))


def _say(config: Sizes, by_factors: int, graphs: Graphs, *, wanted: bool) -> None:
    """Log what the plan's rows do not show. wanted: whether graphs were."""
    if by_factors:
        log.info("batches of up to %s tokens go by factors, longer ones are streamed", f"{by_factors:,}")
    if wanted and not graphs.rows:
        why = "their memory does not fit beside the longest batch"
        if not has_been_captured(config):
            why = "rows of such a model have not been captured yet"
        log.info("no CUDA graphs: %s, so every kernel is launched", why)
    if not has_run(config):
        log.warning(
            "%s: its plan is counted, not measured, and its loss is proved before anything is trained", NOT_SEEN
        )


def within_share(settings: ApplySettings, share: int) -> ApplySettings:
    """`settings` held to the `share` in bytes that the server left for a trainer (0: it said nothing), where the user
    has not said how much: what is free beside it is the server's to grow into."""
    return replace(settings, memory=share / 1e9) if settings.memory is None and share else settings


def keep_within(settings: ApplySettings, device: torch.device, group_bytes: int = 0) -> None:
    """Hold torch's allocator to what --memory leaves beside CUDA's own: it gives back what it keeps for later rather
    than take more. For a process whose weights are somebody else's. group_bytes: what NCCL and other ranks' processes
    take of it."""
    if settings.memory and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        rest = max(0.0, settings.memory * 1e9 - CONTEXT_BYTES - group_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, rest / whole), device)


@contextmanager
def compiling(device: torch.device) -> Iterator[tuple[Compiled, Tuned]]:
    """Around what compiles kernels for a GPU: candidates side by side, and of kernels in the table one."""
    table = shipped_table(card_of(device))
    with parallel_compile() as compiled, tuned_kernels(table) as tuned:
        yield compiled, tuned


def warm(trainer: Trainer, chosen: Chosen) -> None:
    """On a GPU, run every shape once, and make the graphs that `chosen` says; says how far it is."""
    if trainer.device.type == "cpu":
        return
    with progress("warm-up", unit="shapes") as shown:
        torch.cuda.reset_peak_memory_stats(trainer.device)
        try:
            with compiling(trainer.device) as (compiled, tuned):
                report = warm_up(trainer, shown.at, chosen.replayed, chosen.lent, chosen.within_longest)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(_too_little(error)) from error
    gc.collect()
    gc.freeze()  # what lives as long as the worker is not looked through again, least of all in a pause
    log.info("%s; %s; %s; compiled kernels are kept in ~/.triton and ~/.tilelang", report, tuned, compiled)
    if tuned.other_sources:
        names = ", ".join(sorted(name.rpartition(".")[2] for name in tuned.other_sources))
        log.info("the table of tuned kernels is of another version of these, which were tuned: %s", names)
    used, held = torch.cuda.max_memory_allocated(trainer.device), torch.cuda.max_memory_reserved(trainer.device)
    if len(trainer.rows):
        log.info("CUDA graphs of %s rows hold %s", len(trainer.rows), gigabytes(trainer.rows.held_bytes))
    log.info("in the warm-up at most %s were in use, and torch held %s", gigabytes(used), gigabytes(held))


def _too_little(error: torch.OutOfMemoryError) -> str:
    numbers = ". ".join(str(error).split(". ")[:3])
    return (
        "the device's memory did not do for the plan above: others took of it since, torch's allocator was set by hand"
        f" ({', '.join(ALLOCATOR_ENV)}), or the plan counts too little. Use a smaller --max-tokens and --max-length, or"
        f" {SERVER_MEMORY}; a larger --memory, if it was given. {numbers}"
    )
