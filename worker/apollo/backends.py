"""Which implementation of a step a device has."""

from collections.abc import Sequence

import torch

from worker.apollo.errors import ApolloError
from worker.apollo.parameters import Backend, Options, Slot
from worker.apollo.state_layout import StateArea


def one_device(slots: Sequence[Slot]) -> torch.device:
    """Where all parameters are. Raises `ApolloError` if they are on several."""
    devices = {slot.parameter.device for slot in slots}
    if len(devices) != 1:
        raise ApolloError(f"the optimizer's parameters must be on one device, not on {sorted(map(str, devices))}")
    return devices.pop()


def backend_for(device: torch.device, slots: Sequence[Slot], area: StateArea, options: Options) -> Backend:
    """Imports Triton for a GPU alone, and numba for a CPU alone. Raises `ApolloError` for another device."""
    if device.type == "cpu":
        from worker.apollo.cpu import CpuBackend

        return CpuBackend(slots, area, options)
    if device.type == "cuda":
        from worker.apollo.cuda import CudaBackend

        return CudaBackend(slots, area, options)
    raise ApolloError(f"ApolloMini runs on cpu and cuda, not on {device.type}")
