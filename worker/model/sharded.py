"""transformers' model over one rank's part of the weights: the same loss and gradients as one process has.

    model = build_sharded(weights.model_path, weights.tensors, weights.shards, ShardGroup(group))

A rank's model is a smaller one: its heads, the width of its MLP and its vocabulary are divided as vLLM divides them.
What lies between the input of a block (attention, delta net, MLP) and the projection that ends it is computed for this
rank's heads alone; the output is the sum over the ranks, and so is the gradient of the input. A parameter that every
rank has in full is used by each for its own heads, so its gradient is the sum as well: norms over heads, and keys and
values where there are fewer key heads than ranks.

Must not know: the server, the optimizer.
Invariants: what a rank holds in full has the same gradient, bit for bit, on each; whatever is divided in a way that is
not known is refused by name, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.model.patch import ModelError
from worker.model.shard_group import ShardGroup
from worker.model.vocabulary_shard import VocabularyShard, divide_table
from worker.shared_weights import bind
from worker.utils.shard import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN = ("qwen3_5_text",)
"""Models whose division was tried."""
DIVIDED = ("num_attention_heads", "intermediate_size", "linear_num_key_heads", "linear_num_value_heads")
"""Fields of a configuration that are divided by the number of ranks; key heads are, down to one."""
BY_HEAD = ("A_log", "dt_bias")
"""Last parts of the names of parameters that have one number a head."""


def build_sharded(
    model_path: Path, tensors: dict[str, Tensor], shards: Mapping[str, Shard], group: ShardGroup, **options: Any
) -> PreTrainedModel:
    """The text model of `model_path` over this rank's `tensors` (name -> tensor); shards: which part of a whole each
    is, those aside that are whole. `options` go to from_config. Raises `ModelError` or `AttachError`."""
    config = bind.text_config(model_path)
    padding = config.pad_token_id
    vocabulary = _vocabulary(tensors, shards, group)
    model = bind.build_model(model_path, tensors, config=divided(config, group.ranks, vocabulary.rows), **options)
    divide_table(model.get_input_embeddings(), vocabulary, padding)
    model.vocabulary = vocabulary
    _divide_blocks(model, shards, group)
    return model


def divided(config: Any, ranks: int, words: int) -> Any:
    """`config` (changed) of one rank's model, with `words` rows of the vocabulary. Raises `ModelError`."""
    if config.model_type not in KNOWN:
        raise ModelError(
            f"a {config.model_type} that is divided over ranks is not known to the trainer (known: {', '.join(KNOWN)}):"
            " serve it on one GPU"
        )
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name in DIVIDED:
        if (size := getattr(config, name, None)) is not None:
            if size % ranks:
                raise ModelError(f"{name} {size} of the model does not divide by {ranks} ranks")
            setattr(config, name, size // ranks)
    heads = config.num_key_value_heads
    if max(heads, ranks) % min(heads, ranks):
        raise ModelError(f"{heads} key heads do not divide over {ranks} ranks")
    config.num_key_value_heads = max(1, heads // ranks)
    config.vocab_size, config.pad_token_id = words, None  # the latter is a row of the whole table
    return config


def _vocabulary(tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], group: ShardGroup) -> VocabularyShard:
    """The rows of the table here, which are also those of the head."""
    tables = [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    found = {shards.get(name) for name in tables}
    shard = next(iter(found), None)
    if len(found) != 1 or shard is None or shard.dim != 0 or len(shard.pieces) != 1:
        raise ModelError("the table of embeddings and the output head are not divided by rows, and alike")
    ((first, rows),) = shard.pieces
    return VocabularyShard(first, rows, shard.shape[0], group)


def _divide_blocks(model: nn.Module, shards: Mapping[str, Shard], group: ShardGroup) -> None:
    """Put the sums around every block that ends with a matrix divided by its columns."""
    blocks = {name.rpartition(".")[0].rpartition(".")[0] for name, shard in shards.items() if shard.dim == 1}
    inside = {name for block in blocks for name, _ in _named(model, block)}
    for name, shard in shards.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        by_head = isinstance(owner, nn.Linear | nn.Conv1d) or name.endswith(BY_HEAD)
        if not is_table and (name not in inside or not by_head or (shard.dim == 1 and not _is_weight(owner, name))):
            raise ModelError(
                f"{name} is divided over ranks, and the trainer does not know how it is used: not trainable"
            )
    for block in sorted(blocks):
        ends = [name for name, _ in _named(model, block) if name in shards and shards[name].dim == 1]
        if len(ends) != 1:
            raise ModelError(f"{block} has {len(ends)} matrices that are divided by columns, not one")
        end = model.get_submodule(ends[0].rpartition(".")[0])
        _sum_output(end, group)
        model.get_submodule(block).register_forward_pre_hook(_spread_input(group), with_kwargs=True)
        for name, parameter in _named(model, block):
            if name not in shards and parameter is not getattr(end, "bias", None):
                parameter.register_hook(group.total)


def _named(model: nn.Module, block: str) -> list[tuple[str, nn.Parameter]]:
    return [(f"{block}.{name}", parameter) for name, parameter in model.get_submodule(block).named_parameters()]


def _is_weight(owner: nn.Module, name: str) -> bool:
    return isinstance(owner, nn.Linear) and name.endswith(".weight")


def _sum_output(end: nn.Module, group: ShardGroup) -> None:
    """The layer's own sum over its inputs goes on over the ranks; its bias is added once."""

    def forward(module: Any, x: Tensor) -> Tensor:
        out = group.summed(functional.linear(x, module.weight))
        return out if module.bias is None else out + module.bias

    end.forward = MethodType(forward, end)  # type: ignore[method-assign]


def _spread_input(group: ShardGroup) -> Any:
    """A pre-hook that sums the gradient of a block's hidden states."""

    def spread(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], torch.Tensor):
            return (group.spread(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": group.spread(kwargs["hidden_states"])}

    return spread
