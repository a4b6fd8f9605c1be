"""How many CPU threads a version is trained with: by default as many as CPUs are free when it begins.

torch's threads meet at a barrier in every operation. Beside a busy server on few CPUs one of them is always waiting for
a CPU, and all others for it: a version that takes a second alone took minutes. A single thread waits only for itself.
The number goes into the journal with each version, and a replay uses it again. Beside a GPU's work the CPUs have little
to do, and a barrier of all of a large host's threads costs more than it saves: there it is `GPU_THREADS` at most.

Invariant: never more threads than torch would take by itself (OMP_NUM_THREADS).
"""

from collections.abc import Callable

import torch

from worker.utils.free_cpus import free_cpus

ALMOST = 0.25
"""What others may use of a CPU that still counts as free."""
GPU_THREADS = 4
"""CPU threads of a trainer on a GPU."""


class TrainingThreads:
    """wanted: a fixed number, or None to look before each version."""

    def __init__(self, wanted: int | None = None, free: Callable[[], float] = free_cpus) -> None:
        self._most = torch.get_num_threads()
        self._free = free
        self._looks = wanted is None and self._most > 1
        if wanted is not None:
            torch.set_num_threads(wanted)

    def begin_version(self, device: torch.device, processes: int = 1) -> None:
        """Set the number of threads for the version that is trained next on `device`, by so many `processes` at
        once."""
        if self._looks and device.type != "cpu":
            torch.set_num_threads(min(self._most, GPU_THREADS))
        elif self._looks:
            torch.set_num_threads(max(1, min(self._most, int(self._free() + ALMOST) // processes)))
