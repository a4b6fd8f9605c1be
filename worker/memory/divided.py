"""The sizes of one rank's part of a model that is divided over GPUs, and what ranks take beside it.

Must not know: torch, vLLM.
Invariant: a rank's part is counted no smaller than it is; ranks differ by a few rows of the vocabulary at most.
"""

from dataclasses import replace

from worker.memory.model_config import ConfigError, TextConfig
from worker.memory.traced_sizes import Sizes

NCCL_BYTES = 1_500_000_000
"""What NCCL takes of each GPU of a group: some 1.5 GB were seen on two H200."""
SECOND_CONTEXT_BYTES = 600_000_000
"""Of rank 0's process on every other rank's GPU: it reads and writes headers and checkpoints there."""
COPIES = 8
"""Bytes a token and number of its hidden state, of what is copied to be added up over ranks: the gradient of the last
hidden states in fp32, and a block's output beside it."""


def divided(config: Sizes, ranks: int) -> TextConfig:
    """One of `ranks` parts. Raises ConfigError for a model that is not divided."""
    if not isinstance(config, TextConfig) or config.experts is not None:
        raise ConfigError("what a rank takes is known of a dense Qwen3.5 alone")
    return replace(
        config,
        intermediate=-(-config.intermediate // ranks),
        vocab=-(-config.vocab // ranks),
        heads=-(-config.heads // ranks),
        kv_heads=max(1, config.kv_heads // ranks),
        linear_key_heads=-(-config.linear_key_heads // ranks),
        linear_value_heads=-(-config.linear_value_heads // ranks),
    )


def beside(ranks: int) -> int:
    """Bytes of each rank's GPU that are neither weights nor its trainer's own."""
    return NCCL_BYTES + SECOND_CONTEXT_BYTES if ranks > 1 else 0
