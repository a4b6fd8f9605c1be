"""Which backend shares the weights on a device: the only place that names them all."""

import torch

from worker.shared_weights.backend import Description, Opener, Owner, SharingError
from worker.shared_weights.cuda_ipc import CudaOpener, CudaOwner
from worker.shared_weights.shm import SharedFileOpener, SharedFileOwner


def owner_for(device: torch.device) -> Owner:
    """The `Owner` for parameters on `device`."""
    if device.type == "cpu":
        return SharedFileOwner()
    if device.type == "cuda":
        return CudaOwner(device)
    raise SharingError(f"weights on device {device} cannot be shared: only cpu and cuda are supported")


def opener_for(info: Description) -> Opener:
    """The `Opener` for what an owner's `info()` says."""
    if info.get("kind") == "shm":
        return SharedFileOpener(info)
    if info.get("kind") == "cuda":
        return CudaOpener(info)
    raise SharingError(f"the server shares its weights by {info.get('kind')!r}, which this version does not know")
