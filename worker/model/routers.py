"""The routers of a mixture of experts: what chooses, for each token, the experts that compute it.

They are found by what transformers itself declares of a model: whose output it records as `router_logits`
(`_can_record_outputs`, 5.17 to 5.19), not by names of models or of parameters. A gate of a shared expert chooses
nothing, only how much a token takes of it, so it is none of them.

Must not know: the optimizer.
Invariant: nothing is changed but what `freeze_routers` says.
"""

from collections.abc import Iterator
from typing import Any

import torch

from worker.model.model_error import ModelError
from worker.utils.stacks import is_stack

LOGITS = "router_logits"


def freeze_routers(model: torch.nn.Module) -> list[str]:
    """Switch the gradients of `model`'s routers off, and return the names of their parameters, sorted.

    Raises `ModelError` where a model has experts and nothing says which part chooses between them.
    """
    routers, declared = _routers(model)
    if not routers and (declared or _is_stacked(model)):
        raise ModelError(
            f"{type(model).__name__} has experts, and transformers does not say which part of it is the router, which"
            " is frozen by default: use --router trained"
        )
    chosen = {id(parameter) for router in routers for parameter in router.parameters()}
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen:
            parameter.requires_grad_(False)
            names.append(name)
    return sorted(names)


def _routers(model: torch.nn.Module) -> tuple[list[torch.nn.Module], bool]:
    """The routers, and whether any were declared. Some classes declare the block that has the router: not frozen."""
    found, declared = [], False
    wanted = list(_declarations(model))
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    for name, module in model.named_modules():
        if any(_matches(one, name, module) for one in wanted):
            declared = True
            parent = parents.get(id(module), module)
            if not _is_stacked(module) and 2 * _count(module) <= _count(parent):
                found.append(module)
    return found, declared


def _declarations(model: torch.nn.Module) -> Iterator[Any]:
    """Of `model` and of all models in it: classes, names of classes, or transformers' OutputRecorders."""
    for module in model.modules():
        named = getattr(module, "_can_record_outputs", None) or {}
        some = named.get(LOGITS, [])
        yield from some if isinstance(some, list) else [some]


def _matches(one: Any, name: str, module: torch.nn.Module) -> bool:
    """As transformers attaches its hooks (utils/output_capturing.py)."""
    kind = one if isinstance(one, type) else getattr(one, "target_class", None)
    suffix = one if isinstance(one, str) else getattr(one, "class_name", None)
    layer = getattr(one, "layer_name", None)
    if not ((kind is not None and isinstance(module, kind)) or (suffix is not None and name.endswith(suffix))):
        return False
    return layer is None or f".{layer.strip('.')}." in f".{name}."


def _is_stacked(module: torch.nn.Module) -> bool:
    """Whether there are matrices on top of each other in it, [E, rows, cols]."""
    return any(is_stack(parameter.shape) for parameter in module.parameters())


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
