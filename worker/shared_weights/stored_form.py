"""Where the tensors of transformers' text model lie in the files of a checkpoint: by name, and in pieces.

    for name, part in stored_parts(names_in_files, tensors, model_dir).items():
        part.name, part.view     # what the tensor `name` of a file is of: a text tensor, or one expert's rows of it

A checkpoint may hold a wrapper's prefix (a model with a vision part), and one matrix for each expert where transformers
stacks them. What transformers splits, and in which order, is asked of its own conversion (`revert_weight_conversion`,
5.17 to 5.19) with a small tensor whose values say where they came from.

Must not know: the server, Redis.
Invariants: every view is a view; no two share an element; a tensor is there as a whole or not at all.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from worker.shared_weights.bind import on_meta

EMBEDDINGS = "embed_tokens.weight"
"""What tells a prefix: there is one table in a text model, and none of that name in a vision part."""


def stored_names(stored: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Text name -> its name among `stored`, where it is there as a whole."""
    table = next((name for name in names if name.endswith(EMBEDDINGS)), "")
    own = table.removesuffix(EMBEDDINGS)
    found = [name.removesuffix(EMBEDDINGS) for name in stored if name == EMBEDDINGS or name.endswith(f".{EMBEDDINGS}")]
    prefix = own if own in found or len(found) != 1 else found[0]
    head = prefix.removesuffix(own) if own and prefix.endswith(f".{own}") else ""
    wrapped = {name: prefix + name.removeprefix(own) if name.startswith(own) else head + name for name in names}
    return {
        name: candidate
        for name in names
        if (candidate := next((c for c in (name, wrapped[name]) if c in stored), None)) is not None
    }


@dataclass(frozen=True)
class Part:
    """`view`, all or some rows of the text tensor `name`."""

    name: str
    view: torch.Tensor
    whole: bool


def stored_parts(stored: Collection[str], tensors: Mapping[str, torch.Tensor], model_dir: Path) -> dict[str, Part]:
    """Name in the files -> the part of one of `tensors` (text name -> tensor) that it stands for.

    A tensor that the files do not have is in none. model_dir: its configuration says what transformers splits.
    """
    stored = set(stored)
    names = stored_names(stored, tensors.keys())
    parts = {names[name]: Part(name, tensor, True) for name, tensor in tensors.items() if name in names}
    splitter = _Splitter(model_dir)
    for name, tensor in tensors.items():
        if name not in names and tensor.dim() == 3:
            pieces = splitter.pieces(name, tensor)
            if pieces and pieces.keys() <= stored:
                parts |= {key: Part(name, view, False) for key, view in pieces.items()}
    return parts


class _Splitter:
    """What transformers makes of a stacked tensor when it saves the model of `model_dir`."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir

    @cached_property
    def _model(self) -> Any:
        return on_meta(self._model_dir)

    def pieces(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> view, for a stacked `tensor` [E, R, C] whose rows are divided evenly; empty where it is not split."""
        experts, rows, columns = tensor.shape
        shapes = {key: tuple(value.shape) for key, value in self._saved(name, tensor.to("meta")).items()}
        parts = len(shapes) // experts
        if len(shapes) < 2 or len(shapes) != experts * parts or rows % parts:
            return {}
        height = rows // parts
        if set(shapes.values()) != {(height, columns)}:
            return {}
        marked = torch.arange(experts * parts).view(experts, parts, 1)
        places = {key: divmod(int(value), parts) for key, value in self._saved(name, marked).items()}
        return {key: tensor[e, p * height : (p + 1) * height] for key, (e, p) in places.items()}

    def _saved(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, {name: tensor}))
