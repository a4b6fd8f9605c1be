"""CUDA: parameters stay where vLLM allocated them and are opened through CUDA IPC, by torch's own sharing of storages.

The eight values that torch's `UntypedStorage._share_cuda_` returns travel as plain fields; no pickle. torch counts
the consumers of each export, so every process that opens a tensor needs a description of its own.
Torch's private sharing functions are touched in this file only (torch 2.9 to 2.13, checked when first used).

Invariant: nothing here moves or frees a parameter; CUDA graphs keep reading the addresses they captured.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from worker.shared_weights.backend import (
    Description,
    Opener,
    Owner,
    SharingError,
    dtype_name,
    dtype_of,
    unique_parameters,
)

_FIELDS = (
    "device_index",
    "handle",
    "storage_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""What `UntypedStorage._share_cuda_` returns, in its order; the fields of torch.multiprocessing's reduce_tensor."""


class CudaOwner(Owner):
    """Exports parameters where they lie, and areas allocated beside them."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self._device)

    def place(self, model: nn.Module, areas: dict[str, int]) -> dict[str, torch.Tensor]:
        for name, parameter in unique_parameters(model).items():
            if parameter.device != self._device:
                raise SharingError(
                    f"parameter {name} lies on {parameter.device}, not on {self._device}: start the server without"
                    " offloading"
                )
        placed = {name: torch.zeros(size, dtype=torch.uint8, device=self._device) for name, size in areas.items()}
        torch.cuda.synchronize(self._device)
        return placed

    def info(self) -> Description:
        return {"kind": "cuda", "device_uuid": _uuid(self._device.index), "torch": torch.__version__}

    def describe(self, tensor: torch.Tensor) -> Description:
        with self._on_own_stream():  # the export records an event on the current stream
            shared = tensor.untyped_storage()._share_cuda_()
        if len(shared) != len(_FIELDS):
            raise SharingError(f"torch {torch.__version__} shares CUDA memory in a way this version does not know")
        return {
            **dict(zip(_FIELDS, shared, strict=True)),
            "offset": tensor.storage_offset(),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "dtype": dtype_name(tensor.dtype),
        }

    def aside(self) -> AbstractContextManager[Any]:
        return self._on_own_stream()

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


class CudaOpener(Opener):
    """Opens what a `CudaOwner` on the same GPU described."""

    def __init__(self, info: Description) -> None:
        if not torch.cuda.is_available():
            raise SharingError(
                "the server's weights are on a GPU, but this process sees none: check CUDA_VISIBLE_DEVICES"
            )
        uuids = [_uuid(index) for index in range(torch.cuda.device_count())]
        if info["device_uuid"] not in uuids:
            raise SharingError(
                f"the server's weights are on GPU {info['device_uuid']}, this process sees {', '.join(uuids)}:"
                " start the worker with the server's CUDA_VISIBLE_DEVICES"
            )
        self.device = torch.device("cuda", uuids.index(info["device_uuid"]))
        torch.cuda.set_device(self.device)
        torch.cuda.init()

    def open(self, description: Description) -> torch.Tensor:
        fields = [description[field] for field in _FIELDS]
        fields[0] = self.device.index  # the server may count its GPUs differently
        storage = torch.UntypedStorage._new_shared_cuda(*fields)
        shape, stride = tuple(description["shape"]), tuple(description["stride"])
        empty = torch.empty(0, dtype=dtype_of(description["dtype"]), device=self.device)
        return empty.set_(storage, description["offset"], shape, stride)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
