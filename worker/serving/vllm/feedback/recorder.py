"""Watches completions go by and hands those that may be kept to the keeper: a pure ASGI middleware.

It lies outside of the one that names versions, whose header and closing comment it reads. The record's key is random
and leaves with the headers, X-Tandem-Completion: for a stream before its tokens exist, for n > 1 one key for each
choice, in their order. A client that goes away has a record of what it had got.
Must not know: vLLM.
Invariants: bodies are not touched; a request that says "store": false is not looked at any further; nothing here waits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from producer.completions import new_key
from worker.serving.protocol import COMPLETION_HEADER, VERSION_HEADER
from worker.serving.vllm.feedback.requests import MAX_BODY, PATHS, Asked, read
from worker.serving.vllm.feedback.samples import CURRENT, Samples
from worker.serving.vllm.middleware import App, Message, Receive, Send
from worker.serving.vllm.server_state import ServerState

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that is kept; as a stream, one of a token has some 200."""


@dataclass
class Seen:
    """A request and its answer as they went by. keys: one for each choice. newest: the live version, of an answer that
    was cut short, else None."""

    asked: Asked
    keys: list[str]
    samples: Samples
    created: float
    streamed: bool
    version: str
    body: list[bytes] = field(default_factory=list)
    newest: int | None = None
    size: int = 0


class Keeper(Protocol):
    """Takes what was seen; never waits. logprobs: see `Samples`."""

    logprobs: bool

    def keep(self, seen: Seen) -> None: ...


class Recorder:
    """Wraps the application. keeper, state: give theirs, None while the server is starting."""

    def __init__(self, app: App, keeper: Callable[[], Keeper | None], state: Callable[[], ServerState | None]) -> None:
        self._app = app
        self._keeper = keeper
        self._state = state

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        api = None
        if scope["type"] == "http" and scope["method"] == "POST":
            api = PATHS.get(scope["path"].removeprefix(scope.get("root_path", "")))
        keeper, state = self._keeper(), self._state()
        if api is None or keeper is None or state is None:
            return await self._app(scope, receive, send)
        watch = _Watch(receive, send, keeper.logprobs, lambda body: read(api, body))
        token = CURRENT.set(watch.samples)
        try:
            await self._app(scope, watch.receive, watch.send)
        finally:
            CURRENT.reset(token)
            if seen := watch.seen(state.newest):
                keeper.keep(seen)


class _Watch:
    """One request's `receive` and `send`."""

    def __init__(
        self, receive: Receive, send: Send, logprobs: bool, understand: Callable[[bytes], Asked | None]
    ) -> None:
        self._receive, self._send = receive, send
        self._understand = understand
        self.samples = Samples(logprobs, lambda: self.asked is not None)
        self._request: list[bytes] = []
        self._size = 0
        self._seen: Seen | None = None
        self._ended = False

    @cached_property
    def asked(self) -> Asked | None:
        """The request, once its body is here; None where it is not kept."""
        body = b"".join(self._request) if self._size <= MAX_BODY else b""
        self._request.clear()
        return self._understand(body)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and self._size <= MAX_BODY:
            part = message.get("body", b"")
            self._size += len(part)
            self._request.append(part)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._start(message)
        elif message["type"] == "http.response.body" and self._seen is not None:
            part = message.get("body", b"")
            self._seen.size += len(part)
            if self._seen.size <= MAX_ANSWER:
                self._seen.body.append(part)
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        """The start of the answer, with the keys where it is kept."""
        asked = self.asked if message["status"] == 200 else None
        if asked is None:
            return message
        headers = list(message.get("headers", []))
        known = {name.lower(): value.decode("latin-1") for name, value in headers}
        keys = [new_key() for _ in range(asked.choices)]
        streamed = known.get(b"content-type", "").startswith("text/event-stream")
        version = known.get(VERSION_HEADER.encode(), "")
        self._seen = Seen(asked, keys, self.samples, time.time(), streamed, version)
        shown = f"{COMPLETION_HEADER}, {VERSION_HEADER}"  # for scripts of pages from another origin
        headers += [
            (COMPLETION_HEADER.encode(), ", ".join(keys).encode()),
            (b"access-control-expose-headers", shown.encode()),
        ]
        return {**message, "headers": headers}

    def seen(self, newest: int) -> Seen | None:
        """What is to be kept, once the request is over; None where nothing is."""
        seen = self._seen
        if seen is None or seen.size > MAX_ANSWER or self.samples.calls != 1:
            return None
        if not self._ended:
            seen.newest = newest
        seen.size += self._size
        return seen
