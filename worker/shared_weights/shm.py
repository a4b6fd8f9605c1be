"""CPU: one shared-memory file holds every parameter and the areas beside them.

The file is a memfd: it lives in memory like a file of /dev/shm, but has no name there, so nobody can guess it, it is
not bounded by a container's small /dev/shm, and the kernel frees it when the last process that maps it is gone, even
after kill -9: nothing can leak. Others reach it through /proc/<pid>/fd of the server, which the kernel opens to the
same uid only. Seals keep anybody from shrinking it under the server.

"""

import fcntl
import os
from contextlib import nullcontext
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

ALIGNMENT = 64
"""Bytes: a cache line, and what oneDNN and AVX-512 loads like best."""


class SharedFileOwner(Owner):
    """Moves a model's parameters into one memfd."""

    def __init__(self) -> None:
        self._storage: torch.UntypedStorage | None = None
        self._fd = -1

    def place(self, model: nn.Module, areas: dict[str, int]) -> dict[str, torch.Tensor]:
        extents = _extents(unique_parameters(model))
        offsets: dict[int | str, int] = {}  # of each parameter by its old address, of each area by its name
        size = 0
        for key, nbytes in [*extents.items(), *areas.items()]:
            offsets[key] = size
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._fd = os.memfd_create("tandem-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._storage = _map(self._fd_path(os.getpid()), size)
        for parameter in model.parameters():  # each object once; two objects on the same memory go to the same place
            self._move(parameter, offsets[parameter.data_ptr()])
        return {name: _view(self._storage, torch.uint8, offsets[name], (areas[name],), (1,)) for name in areas}

    def _move(self, parameter: nn.Parameter, offset: int) -> None:
        assert self._storage is not None
        view = _view(self._storage, parameter.dtype, offset, tuple(parameter.shape), tuple(parameter.stride()))
        view.copy_(parameter.data)
        parameter.data = view

    def _fd_path(self, pid: int) -> str:
        return f"/proc/{pid}/fd/{self._fd}"

    def info(self) -> Description:
        assert self._storage is not None
        return {"kind": "shm", "path": self._fd_path(os.getpid()), "bytes": self._storage.nbytes()}

    def describe(self, tensor: torch.Tensor) -> Description:
        assert self._storage is not None
        offset = tensor.data_ptr() - self._storage.data_ptr()
        if not 0 <= offset < self._storage.nbytes():
            raise SharingError("a parameter was moved out of the shared file after the export")
        return {
            "offset": offset,
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "dtype": dtype_name(tensor.dtype),
        }

    def aside(self) -> nullcontext[Any]:
        return nullcontext()


class SharedFileOpener(Opener):
    """Maps the server's memfd."""

    device = torch.device("cpu")

    def __init__(self, info: Description) -> None:
        path, size = info["path"], info["bytes"]
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise SharingError(
                f"the server's memory {path} cannot be opened ({error.strerror}): run the worker on the same machine,"
                " under the same user and in the same PID namespace (container) as the server"
            ) from None
        if found != size:
            raise SharingError(f"{path} has {found} bytes, not the {size} the server announced: it is not its memory")
        self._storage = _map(path, size)

    def open(self, description: Description) -> torch.Tensor:
        shape, stride = tuple(description["shape"]), tuple(description["stride"])
        return _view(self._storage, dtype_of(description["dtype"]), description["offset"], shape, stride)


def _map(path: str, size: int) -> torch.UntypedStorage:
    storage = torch.UntypedStorage.from_file(path, True, size)  # True: writes reach the file
    assert isinstance(storage, torch.UntypedStorage)
    return storage


def _view(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A tensor on `storage` from byte `offset` on."""
    return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, shape, stride)


def _extents(parameters: dict[str, nn.Parameter]) -> dict[int | str, int]:
    """Address of each parameter -> bytes from its first to its last element, whatever its strides."""
    extents: dict[int | str, int] = {}
    end, last_name = 0, ""
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].data_ptr()):
        if parameter.device.type != "cpu":
            raise SharingError(f"parameter {name} lies on {parameter.device}, not in the server's memory")
        if parameter.numel() == 0:
            raise SharingError(f"parameter {name} is empty: the server packed or freed it, so it cannot be shared")
        if parameter.data_ptr() < end:
            raise SharingError(f"parameters {last_name} and {name} overlap in memory without being the same")
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        extents[parameter.data_ptr()] = (last + 1) * parameter.element_size()
        end, last_name = parameter.data_ptr() + (last + 1) * parameter.element_size(), name
    return extents
