"""vLLM's three doors into its processes, as entry points: platform, general and endpoint plugin, all named `tandem`.

vLLM loads the first two in every one of its processes wherever Tandem is installed, also under a plain `vllm serve`:
there they return at once. `tandem serve` sets TANDEM_SERVE. Imports here are local: loading this module costs nothing.
Invariant: every function may run many times in a process.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from worker.serving.vllm.feedback.service import FeedbackService
    from worker.serving.vllm.server_state import ServerState

from worker.serving.protocol import SERVE_ENV, VERSION_PATH, WEIGHT_ENGINE

logger = logging.getLogger("vllm.tandem")

_registered = False


def under_tandem_serve() -> bool:
    """Whether this process was started by `tandem serve`."""
    return os.environ.get(SERVE_ENV) == "1"


def platform() -> None:
    """`vllm.platform_plugins`: claims no platform; runs before anything of vLLM's imports torchvision."""
    if under_tandem_serve():
        from worker.utils import torch_setup

        torch_setup.prepare()


def register() -> None:
    """`vllm.general_plugins`: our weight engine, and on the CPU the patch that keeps weights unpacked."""
    global _registered
    if _registered or not under_tandem_serve():
        return
    from worker.serving.vllm import private_api

    private_api.register_weight_engine(WEIGHT_ENGINE, "worker.serving.vllm.weight_engine", "TandemWeightEngine")
    if private_api.on_cpu():
        from worker.serving.vllm import cpu_backend

        cpu_backend.apply()
    _registered = True


def rendering(args: Any) -> dict[str, Any]:
    """How this server turns messages into prompts besides what the model's directory says, for the trainer.

    {"chat_template": its text, or None for the tokenizer's own; "template_kwargs": default arguments of the template}.
    `args` are vLLM's parsed options, --chat-template (a file or the text itself) and --default-chat-template-kwargs.
    """
    template = args.chat_template
    if template is not None and "\n" not in str(template) and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    return {"chat_template": template, "template_kwargs": args.default_chat_template_kwargs or {}}


class TandemEndpoints:
    """`vllm.endpoint_plugins`: GET /weights/version, the versions in answers, the control socket, our metrics, and,
    where they are asked for, completions that are kept and /v1/feedback."""

    name = "tandem"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._state: ServerState | None = None
        self._feedback: FeedbackService | None = None

    def attach_router(self, app: FastAPI) -> None:
        """vLLM's phase A: the route and the middleware, before the engine's client is known.

        The middleware is added here and not by vLLM's --middleware, so that it lies inside vLLM's own: what it refuses
        has passed authentication and carries the headers of CORS.
        """
        if not under_tandem_serve():
            return
        from worker.serving.feedback_options import FeedbackOptions
        from worker.serving.vllm.middleware import WeightVersionMiddleware

        app.add_middleware(WeightVersionMiddleware, state=lambda: self._state)
        app.add_api_route(VERSION_PATH, self._version, methods=["GET"])
        options = FeedbackOptions.of(os.environ)
        if options.any:
            from worker.serving.vllm.feedback.service import FeedbackService
            from worker.serving.vllm.server_metrics import of_process

            self._feedback = FeedbackService(options, of_process())
            self._feedback.attach(app, lambda: self._state)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """vLLM's phase B, before the first request: the engine runs and its worker serves the weights' header."""
        if not under_tandem_serve():
            return
        from worker.serving.cache_policy import CachePolicy
        from worker.serving.vllm import private_api
        from worker.serving.vllm.control_server import Control
        from worker.serving.vllm.lost_prefixes import LostPrefixes
        from worker.serving.vllm.server_metrics import of_process
        from worker.serving.vllm.server_state import ServerState
        from worker.shared_weights.weights_client import read_header
        from worker.utils import unix_socket

        run_dir = unix_socket.default_run_dir()
        header = await asyncio.get_running_loop().run_in_executor(None, read_header, run_dir)
        policy = CachePolicy.of(os.environ)
        server = self._state = ServerState(header["lineage"], header["version"], policy.prefix_max_age)
        of_process().watch(server)
        server.lost_prefixes = LostPrefixes(*private_api.prefix_cache_of(engine_client))
        private_api.salt_requests(engine_client, server.salt)
        if self._feedback is not None:
            from worker.serving.vllm.feedback.samples import CURRENT

            wanted = self._feedback.options
            raw = wanted.record > 0 and private_api.watch_samples(engine_client, CURRENT.get, wanted.logprobs)
            self._feedback.start(raw)
        progress = private_api.progress_of(engine_client)
        score, freeze = private_api.scorer_of(engine_client), private_api.freezer_of(engine_client)
        self._control = Control(engine_client, server, run_dir, rendering(args), freeze, policy, progress, score)
        path = await self._control.start()
        logger.info("tandem: version %d, control socket %s", header["version"], path)

    async def _version(self) -> dict[str, Any]:
        """GET /weights/version: version, lineage, state (serving, paused, torn) and the reason if torn."""
        assert self._state is not None
        return self._state.plain()
