"""vLLM's three doors into its processes, as entry points: platform, general and endpoint plugin, all named `tandem`.

vLLM loads the first two in every one of its processes wherever Tandem is installed, also under a plain `vllm serve`:
there they return at once. `tandem serve` sets TANDEM_SERVE. Imports here are local: loading this module costs nothing.
Must not know: what an update is. Invariant: every function may run many times in a process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

SERVE_ENV = "TANDEM_SERVE"
"""Set to 1 by `tandem serve`; the run directory travels in TANDEM_RUN_DIR."""

WEIGHT_ENGINE = "tandem"
"""Our name among vLLM's weight transfer backends."""

_registered = False


def under_tandem_serve() -> bool:
    """Whether this process was started by `tandem serve`."""
    return os.environ.get(SERVE_ENV) == "1"


def platform() -> None:
    """`vllm.platform_plugins`: claims no platform; runs before anything of vLLM's imports torchvision."""
    if under_tandem_serve():
        from worker import torch_setup

        torch_setup.prepare()


def register() -> None:
    """`vllm.general_plugins`: our weight engine, and on the CPU the patch that keeps weights unpacked."""
    global _registered
    if _registered or not under_tandem_serve():
        return
    from worker.serving import vllm_private

    vllm_private.register_weight_engine(WEIGHT_ENGINE, "worker.weights.export", "TandemWeightEngine")
    if vllm_private.on_cpu():
        from worker.serving import cpu_backend

        cpu_backend.apply()
    _registered = True


class TandemEndpoints:
    """`vllm.endpoint_plugins`: GET /weights/version, the versions in answers, and the control socket."""

    name = "tandem"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """vLLM's phase A: routes and middleware, before the engine's client is known."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """vLLM's phase B: the engine runs and has loaded its weights."""
