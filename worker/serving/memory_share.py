"""The trainer's share of the device: how much of it vLLM is told to leave, when nobody said how much vLLM may take.

vLLM fills the device with its KV cache up to --gpu-memory-utilization, so that a trainer that comes later would find
nothing. Must not know: torch, vLLM.
Invariants: what the user said about vLLM's memory is never changed; every choice is one sentence; bytes are bytes, GB
are 10^9 of them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click

from worker.config.update_options import MAX_TOKENS
from worker.data.batch_capacity import sizes_up_to
from worker.memory.divided import beside, divided
from worker.memory.graphs import graphs_beside
from worker.memory.model_config import ConfigError
from worker.memory.optimizer_memory import state_bytes
from worker.memory.plan import Plan, gigabytes
from worker.memory.planner import CONTEXT_BYTES, make_plan, weight_bytes
from worker.memory.traced_sizes import Sizes, read_sizes
from worker.serving import nvidia_smi
from worker.serving.vllm_flags import KV_FLAGS, LaunchError, parse_flags, said

MARGIN = 3_000_000_000
"""Left to neither: vLLM takes more than its own account says, for CUDA graphs and kernels, and the more so the longer
the prompts are that it has met. A 27B server grew by 2 GB and more within minutes of prompts of all lengths."""
SHARE_ENV = "TANDEM_TRAINER_BYTES"
MOST = 0.92
"""Of the device: vLLM's own default. A small model's trainer is no reason for vLLM to take more than it would alone."""
LEAST_KV = 2_000_000_000
"""A KV cache worth starting a server for."""
GRAPHS_PART = 4
"""Graphs of short rows, which hold their memory for good, may take one part in so many of what the KV cache would
have: nothing at 27B on 80 GB, and graphs of 512 tokens on 141 GB."""
WAY_OUT = "say how much the trainer needs with --trainer-memory N (GB)"


class Share(NamedTuple):
    """What `tandem serve` decides: options for vLLM, a sentence for each choice, and how many bytes of the device the
    trainer may count on; 0 where nobody set any aside."""

    options: list[str]
    notes: list[str]
    bytes: int = 0

    def environment(self) -> dict[str, str]:
        """The share as a variable for vLLM's processes, which tell the trainer."""
        return {SHARE_ENV: str(self.bytes)} if self.bytes else {}


def share_of_environment(environment: Mapping[str, str]) -> int:
    """Bytes that this server was started to leave to its trainer; 0 where nothing was said."""
    return int(environment.get(SHARE_ENV, "0"))


class TrainerMemory(click.ParamType):
    """GB, or the word auto (None)."""

    name = "GB|auto|0"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value is None or value == "auto":
            return None
        try:
            size = float(str(value))
        except ValueError:
            size = math.nan
        if not 0 <= size < math.inf:
            self.fail(f"{value!r} is neither a number of GB nor auto", param, ctx)
        return size


def make_room(
    model: str,
    options: Sequence[str],
    trainer_memory: float | None,
    environment: Mapping[str, str],
    on_cpu: bool,
    optimizer: str = "apollo-mini",
) -> Share:
    """(what to add to vLLM's `options`, one sentence for each choice). trainer_memory: GB; None: by MODEL's sizes.

    Raises LaunchError where the share cannot be known or does not fit.
    """
    if on_cpu:
        if trainer_memory:
            raise LaunchError(
                "--trainer-memory is for GPUs: on a CPU the trainer takes ordinary memory, and VLLM_CPU_KVCACHE_SPACE "
                "says what vLLM takes. Leave --trainer-memory out"
            )
        return Share([], [])
    given = parse_flags(options)
    if where := said_by_user(given):
        return Share([], [f"{where} says what vLLM takes: nothing is set aside for the trainer beyond that"])
    if trainer_memory == 0:
        return Share([], ["nothing is set aside for the trainer (--trainer-memory 0)"])
    return share_of(model, given, trainer_memory, total_memory(environment, ranks_of(given)), optimizer)


def ranks_of(given: Mapping[str, Sequence[str]]) -> int:
    """Over how many devices vLLM divides the model. Raises LaunchError."""
    count = (given.get("--tensor-parallel-size") or ["1"])[-1]
    if not count.isdecimal() or int(count) < 1:
        raise LaunchError(f"--tensor-parallel-size {count}: say a number of GPUs")
    return int(count)


def share_of(
    model: str,
    given: Mapping[str, Sequence[str]],
    trainer_memory: float | None,
    total: int,
    optimizer: str = "apollo-mini",
) -> Share:
    """As `make_room`, on a device of `total` bytes, or on each of several that a model is divided over. given: the
    user's flags, none of them about memory."""
    if trainer_memory is not None:
        return flags_for(total, 0, math.ceil(trainer_memory * 1e9), "--trainer-memory")
    ranks = ranks_of(given)
    try:
        config = read_sizes(find_config(model, given))
        config = config if ranks == 1 else divided(config, ranks)
    except (ConfigError, LaunchError) as error:
        raise LaunchError(f"the trainer's share cannot be computed: {error}; {WAY_OUT}") from None
    plan = default_plan(config, total, optimizer, ranks)
    if ranks == 1:
        plan = with_graphs(plan, config, total, optimizer)
    taken = weight_bytes(config) + state_bytes(config, optimizer)
    return flags_for(total, taken, plan.total, f"{plan.title()}; --trainer-memory says otherwise")


def said_by_user(given: Mapping[str, Sequence[str]]) -> str | None:
    """What on the command line, or in the file of its --config, says how much memory vLLM takes."""
    return said(given, KV_FLAGS)


def default_plan(config: Sizes, total: int, optimizer: str = "apollo-mini", ranks: int = 1) -> Plan:
    """Burst where it takes at most a quarter of the device's `total` bytes, else streaming; layers recomputed. ranks:
    of how many `config` is one part."""
    at = partial(make_plan, config, MAX_TOKENS, kept=0, optimizer=optimizer, ranks=ranks, group_bytes=beside(ranks))
    burst = at(way="burst")
    return burst if 4 * burst.total <= total else at(way="streaming")


def with_graphs(plan: Plan, config: Sizes, total: int, optimizer: str = "apollo-mini") -> Plan:
    """`plan` beside CUDA graphs of short rows, if these take at most one part in `GRAPHS_PART` of the KV cache."""
    cache = max(0, total - weight_bytes(config) - state_bytes(config, optimizer) - plan.total - MARGIN)
    graphs = graphs_beside(
        config, sizes_up_to(MAX_TOKENS), plan.total + cache // GRAPHS_PART, way=plan.way, by_factors=True,
        embeddings="apollo", optimizer=optimizer, context_bytes=CONTEXT_BYTES,
    )  # fmt: skip
    return plan.with_graphs(graphs.total - plan.total, graphs.rows) if graphs.rows else plan


def flags_for(total: int, taken: int, share: int, why: str) -> Share:
    """The flag that leaves `share` of `total` bytes, and its sentence; taken: by weights and state, 0 where unknown.

    Raises LaunchError where not even a small KV cache fits beside them.
    """
    needed = taken + share + MARGIN + LEAST_KV
    if needed > total:
        weights = f"{gigabytes(taken)} for the weights, " if taken else ""
        raise LaunchError(
            f"the device has {gigabytes(total)}, and {gigabytes(needed)} are needed: {weights}{gigabytes(share)} for "
            f"the trainer ({why}), {gigabytes(LEAST_KV)} for the least KV cache and {gigabytes(MARGIN)} to spare. Use "
            "a smaller model or a larger device, or a smaller --trainer-memory N (GB) with fewer --max-tokens in "
            "`tandem worker`"
        )
    flag = f"{min(MOST, (total - share - MARGIN) * 1000 // total / 1000):.3f}"
    note = f"--gpu-memory-utilization {flag} leaves at least {gigabytes(share)} to the trainer ({why})"
    left = max(share, int(total * (1 - float(flag))) - MARGIN)
    return Share(["--gpu-memory-utilization", flag], [note], left)


def find_config(model: str, given: Mapping[str, Sequence[str]]) -> Path:
    """MODEL's config.json: in its directory, or from the hub (its cache first). Raises LaunchError."""
    if Path(model).is_dir():
        return Path(model) / "config.json"
    from huggingface_hub import hf_hub_download

    revisions = given.get("--revision")
    try:
        return Path(hf_hub_download(model, "config.json", revision=revisions[-1] if revisions else None))
    except (OSError, ValueError) as error:  # the bases of the hub's errors
        reason = str(error).strip().partition("\n")[0]
        raise LaunchError(f"{model} is not a directory, and its config.json was not found: {reason}") from None


def total_memory(environment: Mapping[str, str], devices: int = 1) -> int:
    """Bytes of the smallest of the `devices` that vLLM will use: the first of CUDA_VISIBLE_DEVICES. Raises
    LaunchError."""
    try:
        table = nvidia_smi.ask("index", "uuid", "memory.total")
    except LaunchError as error:
        raise LaunchError(_unknown_device(str(error))) from None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    named = list(map(str, range(devices))) if visible is None else visible.split(",")[:devices]
    if len(named) < devices:
        raise LaunchError(f"--tensor-parallel-size {devices}: CUDA_VISIBLE_DEVICES={visible!r} names fewer devices")
    return min(pick_device(table, one) for one in named)


def pick_device(table: str, visible: str | None) -> int:
    """Bytes of the device that `visible` (CUDA_VISIBLE_DEVICES) names first, in nvidia-smi's table of
    "index, uuid, MiB" lines. A UUID may be cut short, as CUDA allows. Raises LaunchError."""
    first = "0" if visible is None else visible.split(",")[0].strip()
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    for index, uuid, size in (row for row in rows if len(row) == 3):
        if first == index or (first.startswith("GPU-") and uuid.startswith(first)):
            if not size.isdecimal() or not int(size):
                raise LaunchError(_unknown_device(f"nvidia-smi says {size!r} for the memory of device {first}"))
            return int(size) << 20
    raise LaunchError(
        _unknown_device(f"CUDA_VISIBLE_DEVICES={visible!r} does not begin with a device that nvidia-smi lists")
    )


def _unknown_device(reason: str) -> str:
    return (
        f"the device's memory is not known: {reason}. Say what vLLM may take with --gpu-memory-utilization, or use "
        "--trainer-memory 0"
    )
