"""transformers' text model on tensors that somebody else owns.

Invariants: no parameter's data is copied or moved, nor written: what transformers computes for itself (rotary
frequencies, the scale of embeddings) is made while all parameters are still on the meta device. Nothing of the model is
left there. No dropout: the same weights give the same loss. Must not know: sockets, the server.
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


def build_model(
    model_path: Path, tensors: dict[str, torch.Tensor], config: Any = None, **options: Any
) -> PreTrainedModel:
    """The text model that `model_path`'s config describes, its parameters being `tensors` (name -> tensor, tied once).

    config: the text config in its place, of a model over parts of the tensors. In training mode, every parameter with
    requires_grad. Shapes must match; each tensor keeps its dtype (A_log stays fp32). `options` go to `from_config`,
    e.g. attn_implementation. `AttachError` names what does not fit.
    """
    model = on_meta(model_path, config, **options)
    expected = dict(model.named_parameters())
    if missing := sorted(expected.keys() - tensors.keys()):
        raise AttachError(f"the server has no weights for {missing[0]} ({len(missing)} such): {_mismatch(model_path)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise AttachError(f"transformers' model has no {unknown[0]} ({len(unknown)} such): {_mismatch(model_path)}")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{tuple(parameter.shape)} in transformers, {tuple(tensors[name].shape)} in the server"
            raise AttachError(f"{name} is {shapes}: {_mismatch(model_path)}")
    compute_buffers(model, next(iter(tensors.values())).device)
    _bind(model, tensors)
    _refuse_meta(model)
    return without_dropout(model).train()


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, which drops nothing in training either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):  # read by attention layers, which have no module for it
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def text_shapes(model_path: Path) -> dict[str, tuple[int, ...]]:
    """The parameters of the text model that `model_path`'s config describes: name -> shape, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in on_meta(model_path).named_parameters()}


def text_config(model_path: Path) -> Any:
    """The configuration of the text model in `model_path`."""
    torch_setup.prepare()  # before transformers looks at torchvision
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path).get_text_config()


def on_meta(model_path: Path, config: Any = None, **options: Any) -> PreTrainedModel:
    """The text model that `model_path`'s config, or `config`, describes, with shapes and without data."""
    config = text_config(model_path) if config is None else config
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **options)
    return model


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


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give every buffer of `model`, whose parameters are on the meta device, its values, by its own `_init_weights`.

    `AttachError` names one that the checkpoint would have, or that transformers does not compute. It is asked twice,
    over buffers full of 0 and of 1: one that it leaves alone differs.
    """
    names = [name for name, _ in model.named_non_persistent_buffers()]
    if stored := sorted({name for name, _ in model.named_buffers()} - set(names)):
        raise AttachError(
            f"buffer {stored[0]} of transformers' model has no data and the server shares none for it: the checkpoint"
            " has it, and it is no parameter, so this model cannot be trained here"
        )
    owners = {name.rpartition(".")[0] for name in names}
    found: list[dict[str, torch.Tensor]] = []
    for fill in (0, 1):
        for name in names:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[key] = torch.full_like(module._buffers[key], fill, device=device)
        for owner in sorted(owners):
            model._init_weights(model.get_submodule(owner))
        found.append({name: model.get_buffer(name).clone() for name in names})
    for name in names:
        if not torch.equal(found[0][name], found[1][name]):
            raise AttachError(
                f"buffer {name} of transformers' model is not in the checkpoint, and transformers does not say what is"
                " in it: this model cannot be trained here"
            )


def _refuse_meta(model: nn.Module) -> None:
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if tensor.is_meta:
                raise AttachError(f"{kind} {name} of transformers' model has no data and the server shares none for it")


def _mismatch(model_path: Path) -> str:
    return f"{model_path}/config.json does not describe the model that is being served; start the server from it again"
