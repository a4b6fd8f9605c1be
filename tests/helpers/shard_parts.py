"""Parts of the tests of tensor parallelism: how vLLM divides a Qwen3.5, and runs of `rank_program.py`."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from patience import PATIENCE

from worker.utils import torch_setup
from worker.utils.shard import Shard

torch_setup.prepare()  # before transformers looks at torchvision
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig  # noqa: E402

COLUMNS = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
WHOLE = ("norm.weight", "layernorm.weight")


def part_of(name: str, shape: Sequence[int], config: Any, rank: int, ranks: int) -> Shard | None:
    """What rank `rank` of vLLM has of tensor `name`, by `config`, a Qwen3.5's text config; None: all of it."""
    if name.endswith(WHOLE):
        return None
    if name.endswith("o_proj.bias"):
        return None
    if (".k_proj." in name or ".v_proj." in name) and config.num_key_value_heads < ranks:
        return None
    if name.endswith(COLUMNS):
        return Shard(tuple(shape), 1, (_slice(0, shape[1], rank, ranks),))
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        height = -(-shape[0] // 64) * 64 // ranks  # vLLM pads the vocabulary to 64 words
        return Shard(tuple(shape), 0, ((height * rank, min(height, shape[0] - height * rank)),))
    sizes = [shape[0]]
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        sizes = [keys, keys, shape[0] - 2 * keys]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Shard(tuple(shape), 0, tuple(_slice(s, n, rank, ranks) for s, n in zip(starts, sizes, strict=True)))


def _slice(start: int, size: int, rank: int, ranks: int) -> tuple[int, int]:
    return start + size // ranks * rank, size // ranks


def divide(
    tensors: Mapping[str, torch.Tensor], config: Any, rank: int, ranks: int
) -> tuple[dict[str, torch.Tensor], dict[str, Shard]]:
    """A rank's parts, in memory of their own, and which parts they are, where a tensor is divided."""
    shards = {name: part_of(name, tensor.shape, config, rank, ranks) for name, tensor in tensors.items()}
    parts = {
        name: tensor.clone() if (shard := shards[name]) is None else shard.of(tensor).clone()
        for name, tensor in tensors.items()
    }
    return parts, {name: shard for name, shard in shards.items() if shard is not None}


def make_grouped(path: Path) -> Path:
    """A model directory, of weights and configuration alone, that divides otherwise than the tiny Qwen3.5: two key
    heads, so that each rank has one; a tied table of 1,000 words, so that the second rank has fewer; biases."""
    config = Qwen3_5TextConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
        linear_value_head_dim=16, full_attention_interval=4, attention_bias=True, tie_word_embeddings=True,
        max_position_embeddings=256, pad_token_id=3, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3_5ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def run_ranks(folder: Path, model: Path, *scenarios: str, ranks: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Scenario -> what each rank's process found, in the order of the ranks."""
    program = str(Path(__file__).with_name("rank_program.py"))
    command = [sys.executable, program, str(ranks), str(folder), str(model), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [scenario.partition("@")[0] for scenario in scenarios]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)] for name in names
    }
