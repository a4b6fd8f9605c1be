"""transformers' text model on tensors that somebody else owns.

Invariants: no parameter's data is copied or moved; nothing of the model is left on the meta device. Must not know:
sockets, the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from worker.shared_weights.errors import AttachError
from worker.utils import torch_setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(model_path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> PreTrainedModel:
    """The text model that `model_path`'s config describes, its parameters being `tensors` (name -> tensor, tied once).

    In training mode, every parameter with requires_grad. Shapes must match; each tensor keeps its dtype (A_log stays
    fp32). `options` go to `from_config`, e.g. attn_implementation. `AttachError` names what does not fit.
    """
    torch_setup.prepare()  # before transformers looks at torchvision
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - tensors.keys()):
        raise AttachError(f"the server has no weights for {missing[0]} ({len(missing)} such): {_mismatch(model_path)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise AttachError(f"transformers' model has no {unknown[0]} ({len(unknown)} such): {_mismatch(model_path)}")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{tuple(parameter.shape)} in transformers, {tuple(tensors[name].shape)} in the server"
            raise AttachError(f"{name} is {shapes}: {_mismatch(model_path)}")
    device = next(iter(tensors.values())).device
    _bind(model, tensors)
    _rebuild_rotary(model, device)
    _refuse_meta(model)
    return model.train()


def _bind(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Replace every parameter, under every name it has (tied embeddings have two)."""
    bound: dict[int, nn.Parameter] = {}  # by the identity of the meta parameter it replaces
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in bound:
                # .data: slices of one merged tensor would otherwise share a version counter, and updating one of them
                # inside backward would make autograd refuse the others (torch 2.13).
                bound[id(parameter)] = nn.Parameter(tensors[first_names[id(parameter)]].data)
            module.register_parameter(key, bound[id(parameter)])


def _rebuild_rotary(model: nn.Module, device: torch.device) -> None:
    """Rotary embeddings hold computed buffers, which a model built on meta lacks."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if key.endswith("rotary_emb"):
                setattr(module, key, type(child)(child.config).to(device))


def _refuse_meta(model: nn.Module) -> None:
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if tensor.is_meta:
                raise AttachError(f"{kind} {name} of transformers' model has no data and the server shares none for it")


def _mismatch(model_path: Path) -> str:
    return f"{model_path}/config.json does not describe the model that is being served; start the server from it again"
