"""The one interface for what differs between shared memory on a CPU (`shm`) and CUDA IPC (`cuda_ipc`).

Owner side: `Owner` makes a model's parameters reachable from another process and allocates areas beside them. Trainer
side: `Opener` turns the owner's plain description of a tensor back into a tensor on the very same memory. What travels
between them is plain msgpack. `backends` picks the pair for a device.

Must not know: vLLM.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from producer.errors import TandemError

Description = dict[str, Any]
"""What one tensor is and where it lies, in msgpack types; only the `Opener` of the same kind reads it."""


class SharingError(TandemError):
    """Memory cannot be shared, or what was described is not there."""


class Owner(ABC):
    """The side that the weights live in: vLLM's worker process."""

    @abstractmethod
    def place(self, model: nn.Module, areas: dict[str, int]) -> dict[str, torch.Tensor]:
        """Make every parameter of `model` shareable and allocate zeroed `areas` (name -> bytes) beside them.

        Parameters keep their identity, shape, stride, dtype and values; tied ones stay one. Returns each area as a
        flat uint8 tensor, 64-byte aligned. `SharingError` names the parameter that cannot be shared. Called once.
        """

    @abstractmethod
    def info(self) -> Description:
        """What an `Opener` needs to know once: {"kind": ..., ...}."""

    @abstractmethod
    def describe(self, tensor: torch.Tensor) -> Description:
        """Where `tensor` (a parameter or an area, after `place`) lies. Call it anew for each process that opens it."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[Any]:
        """A context for small reads from another thread that must wait for none of the model's own work."""


class Opener(ABC):
    """The side that attaches: the trainer's process."""

    device: torch.device

    @abstractmethod
    def open(self, description: Description) -> torch.Tensor:
        """The owner's tensor itself, writable, of the described shape, stride and dtype; no copy."""


def unique_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` by their first name, tied ones (same object, or same memory) once."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    unique = {}
    for name, parameter in model.named_parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape), tuple(parameter.stride()))
        if key not in seen or parameter.numel() == 0:
            unique[name] = parameter
        seen.add(key)
    return unique


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"; `SharingError` for anything else than a dtype's name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SharingError(f"{name!r} is not a torch dtype")
    return dtype
