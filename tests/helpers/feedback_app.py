"""The part of `tandem serve --record --feedback` that needs no engine: an application of a few lines in the place of
vLLM's, with the real middleware, routes, keeper and Redis."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry
from server_options import FEEDBACK_KEY

from worker.serving.feedback_options import FeedbackOptions
from worker.serving.vllm.feedback.samples import CURRENT
from worker.serving.vllm.feedback.service import FeedbackService
from worker.serving.vllm.middleware import WeightVersionMiddleware
from worker.serving.vllm.server_metrics import ServerMetrics
from worker.serving.vllm.server_state import ServerState

QUESTION = [{"role": "user", "content": "When does the shop close?"}]
ANSWER = "At noon."


class Running:
    """client: of the application, with the key of feedback. state: the server's. app: the application itself. registry:
    of its metrics."""

    def __init__(
        self, client: httpx.AsyncClient, state: ServerState, app: FastAPI, registry: CollectorRegistry
    ) -> None:
        self.client, self.state, self.app, self.registry = client, state, app, registry

    async def key(self, **more: Any) -> str:
        """Of a completion that is being kept."""
        body = {"model": "m", "messages": QUESTION} | more
        answer = await self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == ANSWER
        return answer.headers["x-tandem-completion"]

    async def say(self, body: Any, **more: Any) -> httpx.Response:
        return await self.client.post("/v1/feedback", json=body, **more)


async def _chat(request: Request) -> Any:
    """As vLLM answers; two tokens are said to have been sampled."""
    samples = CURRENT.get()
    if samples is not None and samples.begin():
        samples.take(0, [5, 6], None, more=False)
    asked = await request.json()
    message = {"role": "assistant", "content": ANSWER}
    if not asked.get("stream"):
        return {"id": "chatcmpl-1", "choices": [{"index": 0, "message": message}]}

    async def events() -> AsyncIterator[bytes]:
        for word in ("At ", "noon."):
            chunk = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": word}}]}
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@asynccontextmanager
async def running(url: str, monkeypatch: Any, record: float = 1.0, per_minute: int = 1000) -> AsyncIterator[Running]:
    """The application, on the Redis at `url`."""
    monkeypatch.setenv("REDIS_URL", url)
    state = ServerState("0" * 32, 3)
    app = FastAPI()
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"])
    app.add_middleware(WeightVersionMiddleware, state=lambda: state)
    options = FeedbackOptions(record=record, feedback=True, key=FEEDBACK_KEY, per_minute=per_minute)
    registry = CollectorRegistry()
    service = FeedbackService(options, ServerMetrics(registry))
    service.attach(app, lambda: state)
    service.start()
    headers = {"authorization": f"Bearer {FEEDBACK_KEY}"}
    transport = httpx.ASGITransport(app=app)  # what a handler raises, it raises here: no 500 goes by unseen
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem", headers=headers) as client:
            yield Running(client, state, app, registry)
    finally:
        await service.stop()
