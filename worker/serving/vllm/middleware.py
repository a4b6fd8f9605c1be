"""Answers say which version of the weights made them, or why there are none: a pure ASGI middleware.

X-Weight-Version is the version, or `first-last` where weights changed inside the request, or were being changed when
it ended (hogwild), or where its prefix may have been cached up to --prefix-max-age versions ago. A stream's headers
leave before its tokens exist: there the header has the version at the start, and a closing SSE comment,
`: weight-version 3-4`, names the span. A request that arrives during a pause waits here, so that it is wholly the new
version's. With torn weights every request but GET /weights/version, /metrics and /v1/feedback is answered 503 in
OpenAI's error shape. So is a request that was inside when they tore, however late its answer comes. Feedback waits for
nothing: it needs no weights.

A request's body is read here, whole, before the request waits, counts or reaches vLLM: a body that is sent slowly, or
never to its end, holds up nobody.

Must not know: vLLM.
Invariant: bodies are not touched, but for the end of a stream.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from worker.serving.protocol import FEEDBACK_PATH, VERSION_HEADER, VERSION_PATH
from worker.serving.vllm.server_state import ServerState

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_WHEN_TORN = (VERSION_PATH, "/metrics")
TRY_AGAIN_LATER = 1013
"""WebSocket close code."""


class WeightVersionMiddleware:
    """Wraps vLLM's application; `state()` gives the server's state, None while the server is starting."""

    def __init__(self, app: App, state: Callable[[], ServerState | None]) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        state = self._state()
        if state is None or scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == FEEDBACK_PATH or path.startswith(FEEDBACK_PATH + "/"):
            return await self._app(scope, receive, send)
        # Completions are POSTs whatever their path; everything else needs no version and must not wait for a pause.
        if scope["type"] == "http" and scope["method"] == "POST":
            return await self._post(state, scope, receive, send)
        if state.torn and path not in OPEN_WHEN_TORN:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": TRY_AGAIN_LATER, "reason": "weights are torn"})
            return await _refuse(send, state)
        await self._app(scope, receive, send)

    async def _post(self, state: ServerState, scope: Message, receive: Receive, send: Send) -> None:
        if state.torn:
            return await _refuse(send, state)
        body = await _whole_body(receive)
        if body is None:
            return
        await state.running.wait()
        if state.torn:
            return await _refuse(send, state)
        answer = _Answer(send, state)
        state.in_flight += 1
        try:
            await self._app(scope, _replay(body, receive), answer.send)
        finally:
            state.in_flight -= 1


async def _whole_body(receive: Receive) -> list[Message] | None:
    """The messages of a request's body, to its end; None when the client goes away first."""
    messages: list[Message] = []
    while not messages or messages[-1].get("more_body", False):
        message = await receive()
        if message["type"] != "http.request":
            return None
        messages.append(message)
    return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives `messages` first, then what comes after them."""
    left = iter(messages)

    async def next_message() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return next_message


class _Answer:
    """One request's `send`, with the versions it spans."""

    def __init__(self, send: Send, state: ServerState) -> None:
        self._send = send
        self._state = state
        self._first = state.oldest
        self._tears = state.tears
        self._is_stream = False
        self._cut = False

    async def send(self, message: Message) -> None:
        if self._cut:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body" and self._is_stream:
            await self._stream(message)
        else:
            await self._send(message)

    def _torn(self) -> bool:
        """Whether the weights tore within this request, be they whole again or not."""
        return self._state.tears != self._tears

    async def _start(self, message: Message) -> None:
        if self._torn():  # vLLM's answer to an aborted request would look like a short but good one
            self._cut = True
            return await _refuse(self._send, self._state)
        headers = message.get("headers", [])
        self._is_stream = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        value = str(self._first) if self._is_stream else self._span()
        await self._send({**message, "headers": [*headers, (VERSION_HEADER.encode(), value.encode())]})

    async def _stream(self, message: Message) -> None:
        if self._torn():
            self._cut = True
            event = b"data: " + _error(self._state) + b"\n\n"
            return await self._send({"type": "http.response.body", "body": event + self._comment()})
        if not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + self._comment()}
        await self._send(message)

    def _span(self) -> str:
        last = self._state.newest  # being written under us (hogwild), it may have parts in this answer
        return str(last) if last == self._first else f"{self._first}-{last}"

    def _comment(self) -> bytes:
        return f": weight-version {self._span()}\n\n".encode()


def _error(state: ServerState) -> bytes:
    """Why the weights tore, in OpenAI's error shape, as JSON."""
    error = {"message": state.last_tear, "type": "service_unavailable", "param": None, "code": 503}
    return json.dumps({"error": error}).encode()


async def _refuse(send: Send, state: ServerState) -> None:
    body = _error(state)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
