"""The tensors of transformers' text model: their names, shapes, and names in a checkpoint that vLLM loads.

The model is built without data on the meta device, straight from its class: inside vLLM 0.26 the Auto classes do not
work, because that vLLM registers a config of its own for qwen3_5.

Must not know: Redis.
"""

from dataclasses import dataclass
from typing import Any

import torch

from producer.errors import TandemError
from worker.utils import torch_setup


class UnknownModelError(TandemError):
    """This transformers has no text model of that type."""


@dataclass(frozen=True)
class Source:
    """One tensor of the text model."""

    name: str
    """As transformers' ForCausalLM class has it: model.layers.0..."""
    source: str
    """As the checkpoint has it: model.language_model.layers.0... where the checkpoint also holds a vision part."""
    shape: tuple[int, ...]


def text_sources(text_config: dict[str, Any], has_vision: bool) -> list[Source]:
    """Every parameter of the text model that `text_config` (the plain config, with model_type) describes; tied once."""
    torch_setup.prepare()  # before transformers looks at torchvision
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = text_config.get("model_type", "")
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES.get(model_type, ""), None)
    model_class = getattr(transformers, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")), None)
    if config_class is None or model_class is None:
        raise UnknownModelError(
            f"transformers {transformers.__version__} has no causal language model of type {model_type!r}"
        )
    with torch.device("meta"):
        model = model_class(config_class(**text_config))
    return [
        Source(name, checkpoint_name(name) if has_vision else name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]


def checkpoint_name(name: str) -> str:
    """The name of text tensor `name` in the checkpoint of a model that has a vision part as well."""
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name
