"""The middleware, between a client and an application of a few lines, where every moment can be chosen.

The same against a real vLLM: test_lease.py.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from worker.serving.vllm.middleware import WeightVersionMiddleware
from worker.serving.vllm.server_state import ServerState

JSON = [(b"content-type", b"application/json")]
SSE = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
Step = Callable[[], None] | bytes | list[tuple[bytes, bytes]]


def state() -> ServerState:
    return ServerState("0" * 32, 3)


def application(*steps: Step) -> Callable[..., Awaitable[None]]:
    """Sends headers and chunks of body in order, and calls what can be called in between."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for step in steps:
            if callable(step):
                step()
            elif isinstance(step, list):
                await send({"type": "http.response.start", "status": 200, "headers": step})
            else:
                await send({"type": "http.response.body", "body": step, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


class Client:
    """Runs one request through the middleware and keeps what came back."""

    def __init__(self, app: Any, server: ServerState | None) -> None:
        self._middleware = WeightVersionMiddleware(app, state=lambda: server)
        self.messages: list[dict[str, Any]] = []

    async def ask(self, method: str = "POST", path: str = "/v1/completions", kind: str = "http", **scope: Any) -> None:
        await self._middleware({"type": kind, "method": method, "path": path, **scope}, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Any) -> None:
        self.messages.append(dict(message))

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        starts = [message for message in self.messages if message["type"] == "http.response.start"]
        assert len(starts) == 1
        return dict(starts[0]["headers"])

    @property
    def body(self) -> bytes:
        assert not self.messages[-1].get("more_body", False), "the answer has no end"
        assert all(message.get("more_body") for message in self.messages[1:-1])
        return b"".join(message.get("body", b"") for message in self.messages)


def ask(app: Any, server: ServerState, **request: Any) -> Client:
    client = Client(app, server)
    asyncio.run(client.ask(**request))
    return client


def test_an_answer_names_its_version() -> None:
    answer = ask(application(JSON, b"{}"), state())
    assert (answer.status, answer.headers[b"x-weight-version"], answer.body) == (200, b"3", b"{}")
    assert answer.headers[b"content-type"] == b"application/json"


def test_an_answer_that_saw_an_update_names_both_versions() -> None:
    server = state()
    answer = ask(application(server.pause, lambda: server.resume(5), JSON, b"{}"), server)
    assert answer.headers[b"x-weight-version"] == b"3-5"


def test_a_pause_without_an_update_is_no_span() -> None:
    server = state()
    assert ask(application(server.pause, lambda: server.resume(3), JSON), server).headers[b"x-weight-version"] == b"3"


def test_a_stream_names_its_first_version_and_closes_with_the_span() -> None:
    server = state()
    steps = application(SSE, b"data: 1\n\n", server.pause, lambda: server.resume(4), b"data: [DONE]\n\n")
    answer = ask(steps, server)
    assert answer.headers[b"x-weight-version"] == b"3"
    assert answer.body == b"data: 1\n\ndata: [DONE]\n\n: weight-version 3-4\n\n"


def test_a_stream_without_an_update_names_one_version() -> None:
    assert ask(application(SSE, b"data: 1\n\n"), state()).body == b"data: 1\n\n: weight-version 3\n\n"


def test_other_requests_are_left_alone() -> None:
    answer = ask(application(JSON, b"[]"), state(), method="GET", path="/v1/models")
    assert answer.headers == dict(JSON)


def test_a_request_in_a_pause_waits_and_belongs_to_the_next_version() -> None:
    async def run() -> Client:
        server = state()
        server.pause()
        client = Client(application(JSON, b"{}"), server)
        waiting = asyncio.create_task(client.ask())
        reading = Client(application(JSON, b"{}"), server)
        await reading.ask(method="GET", path="/metrics")
        assert reading.status == 200
        for _ in range(10):
            await asyncio.sleep(0)
        assert not client.messages
        assert server.in_flight == 0
        server.resume(4)
        await waiting
        return client

    assert asyncio.run(run()).headers[b"x-weight-version"] == b"4"


def test_a_request_waiting_when_the_weights_tear_is_refused() -> None:
    async def run() -> Client:
        server = state()
        server.pause()
        client = Client(application(JSON, b"{}"), server)
        waiting = asyncio.create_task(client.ask())
        await asyncio.sleep(0)
        server.tear("half written")
        await waiting
        return client

    _is_refusal(asyncio.run(run()))


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_torn_weights_refuse_everything(method: str) -> None:
    server = state()
    server.tear("half written")
    _is_refusal(ask(application(JSON, b"{}"), server, method=method))


@pytest.mark.parametrize("path", ["/weights/version", "/metrics", "/below/metrics"])
def test_torn_weights_can_be_looked_at(path: str) -> None:
    server = state()
    server.tear("half written")
    root = {"root_path": "/below"} if path.startswith("/below") else {}
    assert ask(application(JSON, b"{}"), server, method="GET", path=path, **root).status == 200


def test_an_answer_made_of_an_aborted_request_is_replaced() -> None:
    server = state()
    answer = ask(application(lambda: server.tear("half written"), JSON, b'{"finish_reason": "abort"}'), server)
    _is_refusal(answer)
    assert b"x-weight-version" not in answer.headers


def test_a_stream_that_the_tear_falls_into_ends_with_the_error() -> None:
    server = state()
    steps = application(
        SSE, b"data: 1\n\n", lambda: server.tear("half written"), b"data: abort\n\n", b"data: [DONE]\n\n"
    )
    first, error, comment, rest = ask(steps, server).body.split(b"\n\n")
    assert (first, comment, rest) == (b"data: 1", b": weight-version 3", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "half written"


def test_a_websocket_is_closed_on_torn_weights() -> None:
    server = state()
    server.tear("half written")
    client = ask(application(), server, kind="websocket")
    assert [message["type"] for message in client.messages] == ["websocket.close"]


@pytest.mark.parametrize("fails", [False, True])
def test_requests_inside_are_counted(fails: bool) -> None:
    server = state()
    seen = []

    def look() -> None:
        seen.append(server.in_flight)
        if fails:
            raise ConnectionError

    try:
        ask(application(look, JSON), server)
    except ConnectionError:
        assert fails
    assert (seen, server.in_flight) == ([1], 0)


def _is_refusal(answer: Client) -> None:
    assert answer.status == 503
    assert answer.headers[b"content-length"] == str(len(answer.body)).encode()
    error = json.loads(answer.body)["error"]
    assert (error["message"], error["type"], error["code"]) == ("half written", "service_unavailable", 503)


class SlowClient(Client):
    """Sends its body in pieces, each when `more` says so; `gone`: goes away after the first."""

    def __init__(self, app: Any, server: ServerState, gone: bool = False) -> None:
        super().__init__(app, server)
        self.more, self._gone, self._sent = asyncio.Event(), gone, 0

    async def _receive(self) -> dict[str, Any]:
        self._sent += 1
        if self._sent == 1:
            return {"type": "http.request", "body": b'{"prompt": ', "more_body": True}
        await self.more.wait()
        if self._gone or self._sent > 2:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b'"x"}', "more_body": False}


def echo(receive_more: bool = False) -> Any:
    """An application that answers with the body that it got."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request", message
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if receive_more:
            body = str((await receive())["type"]).encode()
        await send({"type": "http.response.body", "body": body if receive_more else b"", "more_body": False})

    return app


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_half_sent_request_counts_for_nothing_until_its_body_is_whole() -> None:
    async def run() -> None:
        server = state()
        client = SlowClient(echo(), server)
        asking = asyncio.create_task(client.ask())
        await _settled()
        assert (server.in_flight, client.messages) == (0, [])
        server.pause()
        client.more.set()
        await _settled()
        assert (server.in_flight, client.messages) == (0, []), "whole now, it waits for the end of the pause"
        server.resume(4)
        await asking
        assert (client.status, client.body, client.headers[b"x-weight-version"]) == (200, b'{"prompt": "x"}', b"4")

    asyncio.run(run())


def test_a_half_sent_request_is_refused_when_the_weights_tear_meanwhile() -> None:
    async def run() -> Client:
        server = state()
        client = SlowClient(echo(), server)
        asking = asyncio.create_task(client.ask())
        await _settled()
        server.tear("half written")
        client.more.set()
        await asking
        return client

    _is_refusal(asyncio.run(run()))


def test_a_client_that_goes_away_within_its_body_is_forgotten() -> None:
    async def run() -> Client:
        server = state()
        client = SlowClient(echo(), server, gone=True)
        client.more.set()
        await client.ask()
        assert server.in_flight == 0
        return client

    assert asyncio.run(run()).messages == []


def test_the_application_still_hears_of_a_client_that_goes_away_after_its_body() -> None:
    async def run() -> Client:
        client = SlowClient(echo(receive_more=True), state())
        client.more.set()
        await client.ask()
        return client

    assert asyncio.run(run()).body == b'{"prompt": "x"}http.disconnect'


@pytest.mark.parametrize("headers", [JSON, SSE])
def test_an_answer_that_comes_after_the_weights_were_mended_is_still_no_answer(headers: Any) -> None:
    """vLLM ended the request when the weights tore; what it says of that may come late."""
    server = state()
    early = [headers] if headers is SSE else []
    late = [] if headers is SSE else [headers]
    steps = application(
        *early, lambda: server.tear("half written"), lambda: server.resume(4), *late, b"data: cut short\n\n"
    )
    answer = ask(steps, server)
    assert b"cut short" not in answer.body and b"half written" in answer.body
    if headers is JSON:
        _is_refusal(answer)
    assert ask(application(JSON, b"{}"), server).headers[b"x-weight-version"] == b"4", "others are answered"


def test_an_answer_that_is_made_while_the_next_version_is_written_names_both() -> None:
    server = state()
    server.begin_hogwild()
    assert ask(application(JSON, b"{}"), server).headers[b"x-weight-version"] == b"3-4"
    assert ask(application(SSE, b"data: 1\n\n"), server).body.endswith(b": weight-version 3-4\n\n")
