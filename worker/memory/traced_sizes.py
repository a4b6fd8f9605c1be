"""The sizes of a model that was traced: what the plan asks, by kind of layer, as counted and not as known.

    sizes = read_sizes(folder / "config.json")    # any model's: a Qwen3.5's by arithmetic, else traced

The trace builds the model without data in transformers, which takes torch (`worker.model.layer_trace`). Here it runs in
a process of its own, some ten seconds, and says its answer in JSON: `tandem serve` plans before torch may be imported.
A Qwen3.5 stays with its arithmetic: the kernels of its delta net cannot be traced.

Must not know: torch.
Invariant: both kinds of `Sizes` answer the same questions, in the same units.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.memory.model_config import ConfigError, OtherModelError, Shapes, TextConfig
from worker.utils.stacks import is_stack

TRACER = "worker.model.layer_trace"
LONGEST_TRACE = 600.0
"""Seconds: whoever takes longer hangs."""


@dataclass(frozen=True)
class LayerCosts:
    """Of one kind of layer. saved: bytes a token that forward keeps for backward, its input included; extra: what
    backward has beside them at its largest; factors: what its matrices leave in place of gradients."""

    shapes: Shapes
    saved: int
    extra: int
    factors: int


@dataclass(frozen=True)
class TracedSizes:
    """`layers` names each layer's kind, a key of `kinds`. named: every parameter, a tied head not twice; table_names:
    embeddings, and the head where it is a parameter of its own; exact: how many parameters the server holds in fp32;
    model_type: config.json's."""

    hidden: int
    vocab: int
    tied: bool
    layers: tuple[str, ...]
    kinds: dict[str, LayerCosts]
    named: Shapes
    table_names: tuple[str, ...]
    exact: int = 0
    model_type: str = ""

    def tables(self) -> Shapes:
        """As `TextConfig.tables`."""
        return {name: self.named[name] for name in self.table_names}

    def layer(self, kind: str) -> Shapes:
        """As `TextConfig.layer`."""
        return self.kinds[kind].shapes

    def parameters(self) -> Shapes:
        """As `TextConfig.parameters`."""
        return self.named

    def count(self) -> int:
        """As `TextConfig.count`."""
        return sum(math.prod(shape) for shape in self.named.values())

    def stacks(self) -> int:
        """As `TextConfig.stacks`."""
        return sum(math.prod(shape) for shape in self.named.values() if is_stack(shape))

    @staticmethod
    def of(found: Mapping[str, Any]) -> "TracedSizes":
        """From its fields in JSON's types."""
        kinds = {
            name: LayerCosts(_shapes(costs["shapes"]), costs["saved"], costs["extra"], costs["factors"])
            for name, costs in found["kinds"].items()
        }
        rest: dict[str, Any] = {name: found[name] for name in ("hidden", "vocab", "tied", "exact", "model_type")}
        rest |= {name: tuple(found[name]) for name in ("layers", "table_names")}
        return TracedSizes(kinds=kinds, named=_shapes(found["named"]), **rest)


Sizes = TextConfig | TracedSizes
NOT_SEEN = "no GPU has trained such a model yet"
RAN = frozenset({"gemma3_text", "llama", "qwen3"})
"""Types whose models a GPU trained beside a live server, and whose plans were compared with what they took
(benchmarks/RESULTS.md: within 6 % on an H200). All Qwen3.5 besides, mixtures included."""


def has_run(sizes: Sizes) -> bool:
    """Whether a GPU has trained such a model."""
    return isinstance(sizes, TextConfig) or sizes.model_type in RAN


def has_been_captured(sizes: Sizes) -> bool:
    """Whether rows of such a model were replayed as CUDA graphs: a dense Qwen3.5's."""
    return isinstance(sizes, TextConfig) and sizes.experts is None


def read_sizes(path: Path) -> Sizes:
    """Of the model whose config.json is `path`. Raises ConfigError naming it, with the reason."""
    try:
        return TextConfig.read(path)
    except OtherModelError:
        return _traced_elsewhere(path)


def _traced_elsewhere(path: Path) -> TracedSizes:
    command = [sys.executable, "-m", TRACER, str(path.parent)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # no context of a device that is to be measured
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_TRACE, check=False, env=environment
        )
        found = json.loads(ended.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: what its training takes could not be counted ({error})") from None
    if "error" in found:
        raise ConfigError(f"{path}: {found['error']}")
    return TracedSizes.of(found)


def _shapes(found: Mapping[str, Any]) -> Shapes:
    return {name: tuple(shape) for name, shape in found.items()}
