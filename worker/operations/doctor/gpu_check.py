"""The device's memory: what is really free against the share that the server was started to leave its trainer.

No run on a GPU has been seen by this check; its numbers are judged by `judge`, which is tested.

Must not know: torch, vLLM, Redis. Invariants: allocates nothing on the device; bytes are bytes.
"""

import importlib
from typing import Any

from producer.errors import TandemError
from worker.config.update_options import MAX_TOKENS
from worker.memory.planner import make_plan
from worker.memory.traced_sizes import read_sizes
from worker.operations.doctor.finding import Fact, Finding, fault, ok, unchecked
from worker.operations.doctor.server_view import ServerView
from worker.serving.memory_share import share_of_environment

NAME = "GPU memory"


def check_gpu(server: ServerView, worker_runs: bool) -> Finding:
    """Of the server's device. worker_runs: then the trainer has its share already, and what is free says nothing."""
    if not server.state:
        return unchecked(NAME, Fact.GPU_UNCHECKED, reason="no server is running")
    if not server.on_gpu:
        return unchecked(NAME, Fact.GPU_UNCHECKED, reason="the server runs on a CPU")
    try:
        needed = least_needed(server)
        free = None if worker_runs else free_memory(str(server.described["memory"]["device_uuid"]))
    except (TandemError, ImportError) as error:
        return unchecked(NAME, Fact.GPU_UNCHECKED, reason=str(error))
    return judge(share_of_environment(server.environment), needed, free)


def judge(share: int, needed: int, free: int | None) -> Finding:
    """share: what the server leaves (0: nothing was said); needed: by the leanest way of training; free: on the device
    now, None where the trainer runs already."""
    values = {"share": share, "needed": needed, "free": free}
    if share and share < needed:
        return fault(NAME, Fact.GPU_SHARE_SMALL, **values)
    if free is not None and free < max(share, needed):
        return fault(NAME, Fact.GPU_NOT_FREE, **values)
    return ok(NAME, Fact.GPU_FITS, **values)


def least_needed(server: ServerView) -> int:
    """What a trainer of the served model takes in streaming, all layers recomputed. Raises `ConfigError`."""
    assert server.model is not None
    config = read_sizes(server.model / "config.json")
    optimizer = str(server.described.get("optimizer", "apollo-mini"))
    return make_plan(config, MAX_TOKENS, way="streaming", kept=0, optimizer=optimizer).total


def free_memory(uuid: str) -> int:
    """Of the device with `uuid`, as NVML says. ImportError without pynvml; TandemError where NVML fails."""
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise TandemError(f"NVML failed: {error}") from None
