"""The decoder layers of a model, found by structure, and which of them are computed again in backward.

Must not know: the optimizer.
Invariant: nothing is computed otherwise; only what is kept for backward changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from worker.model.model_error import ModelError


def layers_of(model: Any) -> nn.ModuleList:
    """The one list in `model.base_model` of as many layers as the configuration says, each of which transformers can
    compute again (`GradientCheckpointingLayer`). Raises ModelError."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(lists) or 'no'} lists of {count} layers that transformers can compute"
            " again in backward: it cannot be trained on a GPU"
        )
    return lists[0]


def recompute(model: Any, kept: Callable[[int], int]) -> None:
    """Have `model` compute its layers again in backward, but for the last `kept(tokens)` in a row of so many tokens."""
    # Non-reentrant checkpoints stop a layer's recomputation at the last tensor that backward needs, which spares the
    # down projection. There is no dropout, so the state of the random generators is not kept.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    layers: list[Any] = list(layers_of(model))

    def choose(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The last layers are those whose activations backward frees first."""
        embeds = kwargs.get("inputs_embeds")  # [B, T, H]
        tokens = kwargs["input_ids"].numel() if embeds is None else embeds.shape[:2].numel()
        first = len(layers) - kept(tokens)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < first

    model.base_model.register_forward_pre_hook(choose, with_kwargs=True)
