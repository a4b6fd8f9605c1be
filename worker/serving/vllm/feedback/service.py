"""Recording and feedback, put together for one server: what is added to its application, and what runs behind it.

Must not know: vLLM.
Invariants: nothing is added that was not asked for; no connection is made before the first completion or feedback.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis.asyncio

from producer import AsyncProducer
from producer.completions import Completion, Kept, save_async
from producer.connection import connect, resolve_url
from worker.serving.feedback_options import FeedbackOptions
from worker.serving.vllm.feedback.keeper import Keeper
from worker.serving.vllm.feedback.recorder import Recorder
from worker.serving.vllm.feedback.routes import FeedbackRoutes
from worker.serving.vllm.server_metrics import ServerMetrics
from worker.serving.vllm.server_state import ServerState

if TYPE_CHECKING:
    from fastapi import FastAPI


RECOUNT = 10_000
"""After so many records what all of them take is added up again, and at the first of a server."""


class FeedbackService:
    """What `options` ask for. `attach` comes first, `start` when the engine runs, on the server's loop."""

    def __init__(self, options: FeedbackOptions, metrics: ServerMetrics) -> None:
        self.options, self._metrics = options, metrics
        self._keeper: Keeper | None = None
        self._producer: AsyncProducer | None = None
        self._client: Any = None

    def attach(self, app: "FastAPI", state: Callable[[], ServerState | None]) -> None:
        """Add the middleware, outside of the one that names versions, and the routes."""
        if self.options.record:
            app.add_middleware(Recorder, keeper=lambda: self._keeper, state=state)
        if self.options.feedback:
            routes = FeedbackRoutes(self.options, lambda: self._producer, lambda: self._keeper, self._metrics.feedback)
            routes.attach(app)

    def start(self, logprobs: bool = True) -> None:
        """Take completions and feedback from now on. logprobs: whether the engine says the model's own."""
        url = resolve_url(None)
        if self.options.record:
            client: Any = connect(url, redis.asyncio.Redis.from_url)
            self._client, saved = client, itertools.count()

            async def save(completion: Completion) -> Kept:
                limits = self.options.seconds, self.options.record_bytes
                return await save_async(client, completion, *limits, recount=next(saved) % RECOUNT == 0)

            self._keeper = Keeper(save, logprobs, self._metrics.completion)
            self._keeper.start()
        if self.options.feedback:
            self._producer = AsyncProducer(url)

    async def stop(self) -> None:
        """End what `start` began. What is not in Redis yet is lost."""
        if self._keeper is not None:
            await self._keeper.stop()
            await self._client.aclose()
        if self._producer is not None:
            await self._producer.close()
