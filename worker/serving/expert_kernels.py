"""Which of vLLM's kernels computes a mixture's experts on a GPU: one that reads the weights as the loader wrote them.

The others swap the halves of `w13_weight`, pad it or permute it in blocks (vLLM 0.32,
fused_moe/oracle/unquantized.py), some in the same shape, so that a trainer would write into the wrong places. Triton's
do not. On a Hopper GPU vLLM takes Triton's by itself, on others not, so it is said.

Must not know: vLLM, torch.
Invariant: what the user said is not changed; "auto" says nothing.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from worker.memory.model_config import ConfigError, has_experts, read_config
from worker.serving.memory_share import find_config
from worker.serving.vllm_flags import LaunchError, json_config, parse_flags, said

FLAG = "--moe-backend"
SHARED = ("triton", "batched_triton")
"""The first is what is chosen."""


class Kernels(NamedTuple):
    """What to add to vLLM's options, and a sentence for it."""

    options: list[str]
    notes: list[str]


def kernel_options(model: str, options: Sequence[str], on_cpu: bool) -> Kernels:
    """For MODEL, by its config.json. Where that cannot be read, nothing: vLLM says why, or it is asked again beside the
    weights (serving/vllm/unsupported_flags.py)."""
    given = parse_flags(options)
    if on_cpu or any(name != "auto" for name in _asked(given)) or said(given, [FLAG]) not in (None, FLAG):
        return Kernels([], [])
    try:
        config = read_config(find_config(model, given))
    except (ConfigError, LaunchError):
        return Kernels([], [])
    if not has_experts(config):
        return Kernels([], [])
    return Kernels([FLAG, SHARED[0]], [f"{FLAG} {SHARED[0]}: other kernels rearrange the weights of the experts"])


def refused_backend(given: Mapping[str, Sequence[str]]) -> str | None:
    """Why the kernel that the flags `given` name cannot be used; None if it can, or none is named."""
    for name in _asked(given):
        if name != "auto" and name not in SHARED:
            return f"{FLAG} cannot be used with tandem serve like this: {rearranged(name)}"
    return None


def rearranged(name: str) -> str:
    """The sentence about one that is not SHARED."""
    return f"{FLAG} {name} may rearrange the weights of the experts, which the trainer writes: use {SHARED[0]}"


def _asked(given: Mapping[str, Sequence[str]]) -> list[str]:
    """As vLLM's parser has them: in lower case, with underscores."""
    configs = [json_config(text) for text in given.get("--kernel-config", ())]
    names = [*given.get(FLAG, ()), *given.get("--kernel-config.moe-backend", ())]
    names += [str(config["moe_backend"]) for config in configs if "moe_backend" in config]
    return [name.lower().replace("-", "_") for name in names]
