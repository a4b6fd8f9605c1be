"""How many tokens vLLM computes in one step, where nobody said: fewer than its own default on an H100 or H200.

An update waits for the step that runs. With prompts of thousands of tokens that was most of a transcript's way: at 27B
on an H200 0.36 to 0.57 s with vLLM's 8,192 tokens, 0.19 s with 4,096, and the server alone made 299 tokens/s in place
of 301 (benchmarks/RESULTS.md).
Must not know: torch, vLLM. Invariant: what the user said about steps is never changed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from worker.serving import nvidia_smi
from worker.serving.vllm_flags import LaunchError, parse_flags, said

FLAG = "--max-num-batched-tokens"
ABOUT_STEPS = (
    "--enable-chunked-prefill",
    "--no-enable-chunked-prefill",
    "--performance-mode",  # "throughput" doubles vLLM's default
    "--speculative-config",  # some methods take a part of each step: vLLM may refuse, and wants 8,192
    "--spec-model",
    "--spec-method",
)
"""Flags beside which vLLM's own default stays."""
STEP = 4096
SIZES = range(70 << 30, 160 << 30)
"""Bytes of the devices on which vLLM's own default for a server is 8,192 (0.26 and 0.32, EngineArgs.get_batch_defaults)
but for the A100, where it is 2,048. On larger ones it is 16,384: none was measured."""


class StepSize(NamedTuple):
    """Options for vLLM, and a sentence for each choice."""

    options: list[str]
    notes: list[str]


def step_size(options: Sequence[str], on_cpu: bool) -> StepSize:
    """What to add to vLLM's `options`."""
    given = parse_flags(options)
    if on_cpu or said(given, (FLAG,)) or not fits(given):
        return StepSize([], [])
    try:
        devices = nvidia_smi.ask("name", "memory.total")
    except LaunchError as error:
        return StepSize([], [f"vLLM's own {FLAG}: the device is not known ({error})"])
    if not are_meant(devices):
        return StepSize([], [])
    note = (
        f"{FLAG} {STEP}, for an update waits for the step that runs (vLLM's own 8192 serves as many tokens, and lets"
        " updates wait twice as long)"
    )
    return StepSize([FLAG, str(STEP)], [note])


def fits(given: Mapping[str, Sequence[str]]) -> bool:
    """Whether steps of `STEP` tokens go with these flags: none of `ABOUT_STEPS`, and no more requests than tokens."""
    if said({flag.partition(".")[0]: values for flag, values in given.items()}, ABOUT_STEPS):
        return False
    (requests,) = (given.get("--max-num-seqs") or ["1"])[-1:]
    return requests.isdecimal() and int(requests) <= STEP


def are_meant(devices: str) -> bool:
    """Whether all devices of the machine are. devices: a line "name, MiB" of each, as nvidia-smi says it."""
    rows = [line.rpartition(",") for line in devices.splitlines() if line.strip()]
    return bool(rows) and all(
        size.strip().isdecimal() and int(size) << 20 in SIZES and "a100" not in name.lower() for name, _, size in rows
    )
