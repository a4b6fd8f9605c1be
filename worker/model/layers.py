"""The decoder layers of a model, found by structure: of which kinds they are, and which are computed again in backward.

    recompute(model, kept)           # from now on; what is computed stays the same, but for what is kept meanwhile
    with first_of_each_kind(model):  # a model of a few layers, whose kernels are all that the whole model has

Must not know: the optimizer.
Invariant: after `first_of_each_kind` the model is what it was.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
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


def types_of(model: Any) -> list[str | None]:
    """Of each layer by the configuration: "full_attention", "sliding_attention" and the like; None where it says
    nothing."""
    config = model.config.get_text_config()
    return list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)


def kinds_of(model: Any) -> list[Hashable]:
    """Of each layer: layers of one kind are equal in class, shapes and type. They run the same kernels, but for what a
    class leaves out of some by their number (rotary positions in SmolLM3)."""
    layers = layers_of(model)
    shapes = [tuple((name, tuple(one.shape)) for name, one in layer.named_parameters()) for layer in layers]
    return list(zip(map(type, layers), shapes, types_of(model), strict=True))


@contextmanager
def first_of_each_kind(model: Any) -> Iterator[None]:
    """Inside, `model` has only its first layers: as many as it takes to have one of each kind."""
    kinds, layers = kinds_of(model), layers_of(model)
    few = 1 + max(map(kinds.index, set(kinds)))
    owner, name = next(
        (owner, name)
        for owner in model.base_model.modules()
        for name, child in owner.named_children()
        if child is layers
    )
    setattr(owner, name, layers[:few])
    try:
        yield
    finally:
        setattr(owner, name, layers)


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
