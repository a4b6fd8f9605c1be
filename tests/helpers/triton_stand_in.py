"""A GPU for Triton where there is none: kernels are compiled for Hopper by Triton itself, and launches are noted."""

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


class StandInDriver:
    """What Triton asks of a driver. launched: the warps of each launch, in order. threads: how many a block may have.
    timed: how often a candidate was timed; `seconds` says what it took, by its number."""

    def __init__(self, seconds: Callable[[int], float] = float, threads: int = 1024) -> None:
        self.launched: list[int] = []
        self.timed, self.seconds, self.threads = 0, seconds, threads
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        """No module, so that none is unloaded; threads that a block may have."""
        return None, None, 0, 0, self.threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: self.launched.append(metadata.num_warps)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def timed(call: Callable[[], Any], quantiles: Any) -> list[float]:
            call()
            self.timed += 1
            return [self.seconds(self.timed)] * 3

        return timed
