"""Watches a model's own loader: records every write into its parameters, and lets none of them happen.

The loader is fed meta tensors (shapes without data). A write is understood when it copies a piece of one of them,
unchanged in layout, into a piece of a parameter, or fills a piece with zeros (vocabulary padding). A piece is a run of
elements, or some columns of a matrix: the part of a layer that tensor parallelism divides by its inputs. Anything else,
such as a permuted or computed value, is refused by the parameter's name: the trainer could not train it in place.

Checked on the Qwen3.5 loaders of vLLM 0.26.0 and 0.32.0. Must not know: vLLM, transformers.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from producer.errors import TandemError


class MappingError(TandemError):
    """The server's parameters cannot be mapped one to one on the trainer's."""


@dataclass(frozen=True)
class Write:
    """One recorded write: `count` elements of parameter `param` from element `start` on."""

    param: str
    start: int
    count: int
    source: str | None
    """The tensor copied from, or None for zeros."""
    source_start: int = 0
    """Element of the source that the copied piece starts at."""
    columns: int | None = None
    """Where the piece is some columns of whole rows of a matrix: how many."""


class Recorder(TorchDispatchMode):
    """While active, writes to `parameters` are recorded in `.writes` instead of done; all else runs as usual.

    `sources` are the meta tensors fed to the loader, by name; each must have a storage of its own.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.writes: list[Write] = []
        placed = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), n) for n, p in parameters.items())
        self._starts = [start for start, _, _ in placed]
        self._placed = placed
        self._sources = {tensor.untyped_storage()._cdata: name for name, tensor in sources.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in sources.items()}
        self._device = next(iter(parameters.values())).device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in target if isinstance(target, (list, tuple)) else [target]:
                if isinstance(tensor, torch.Tensor) and (place := self._find(tensor)) is not None:
                    self._record(func, place, tensor, args)
                    return target
        return func(*args, **kwargs)

    def _find(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """(parameter, byte offset) that `tensor` starts at, or None if it is no part of a parameter."""
        if tensor.device != self._device or tensor.numel() == 0:
            return None
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0 or tensor.data_ptr() >= self._placed[index][1]:
            return None
        return self._placed[index][2], tensor.data_ptr() - self._placed[index][0]

    def _record(self, func: Any, place: tuple[str, int], target: torch.Tensor, args: tuple[Any, ...]) -> None:
        param, offset = place
        start = offset // target.element_size()
        if not target.is_contiguous():
            raise MappingError(f"parameter {param}: the loader writes strided pieces of it; they cannot be mapped")
        if func is torch.ops.aten.copy_.default and isinstance(args[1], torch.Tensor):
            self.writes.append(self._copied(param, start, target, args[1]))
        elif _fills_with_zero(func, args):
            self.writes.append(Write(param, start, target.numel(), None))
        else:
            raise MappingError(f"parameter {param}: the loader writes it by {func}, not by copying a checkpoint tensor")

    def _copied(self, param: str, start: int, target: torch.Tensor, source: torch.Tensor) -> Write:
        name = self._sources.get(source.untyped_storage()._cdata) if source.is_meta else None
        if name is None:
            raise MappingError(
                f"parameter {param}: the loader fills it with a computed value, not with a piece of a checkpoint"
                " tensor; such a parameter cannot be trained in place"
            )
        if source.shape == target.shape and _is_columns(source, self._shapes[name]):
            return Write(param, start, target.numel(), name, int(source.storage_offset()), source.shape[1])
        if not source.is_contiguous() or source.shape != target.shape:
            raise MappingError(
                f"parameter {param}: the loader permutes or broadcasts {name} into it ({tuple(source.shape)} with"
                f" strides {source.stride()} into {tuple(target.shape)}); a view cannot undo that"
            )
        return Write(param, start, target.numel(), name, int(source.storage_offset()))


def _is_columns(piece: torch.Tensor, whole: tuple[int, ...]) -> bool:
    """Whether `piece` is some, not all, of the columns of a matrix of shape `whole`, for some of its rows."""
    if len(whole) != 2 or piece.dim() != 2 or piece.shape[1] == whole[1]:
        return False
    first = int(piece.storage_offset()) % whole[1]
    rows_apart = piece.shape[0] == 1 or piece.stride(0) == whole[1]
    return rows_apart and piece.stride(1) == 1 and first + piece.shape[1] <= whole[1]


def _fills_with_zero(func: Any, args: tuple[Any, ...]) -> bool:
    if func is torch.ops.aten.zero_.default:
        return True
    return func is torch.ops.aten.fill_.Scalar and args[1] == 0
