"""What the fuzz tests throw at /v1/feedback: bodies, ids and headers, through the real application onto a real Redis.

What is answered 202 is in the queue; every other answer has a status that says whose failure it is, and is never 500;
and a record whose key was not given stays as it was, and shows in no answer.
"""

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import redis
from feedback_app import Running, running
from fuzz_bytes import plain
from hypothesis import strategies as st

from producer import keys
from producer.completions import KEY_PATTERN

SECRET = "a text that is nobody else's"
ALLOWED = {200, 202, 401, 404, 413, 422, 503}
EVERY = 500
"""Cases after which Redis is emptied and new records are made."""

ids = st.sampled_from(["KEY", "OTHER"] * 4 + ["chatcmpl-1", "", "a" * 22, "../" * 7 + "x", "\x00" * 22]) | plain
users = st.sampled_from([None, "a", "b", "c"])
texts = st.text(max_size=10)
rating = st.sampled_from([-1, 1, True, False, 0, 1e-9, 0.5, -0.5, 1.5])
correction = texts | st.fixed_dictionaries({"content": texts}, optional={"role": plain, "tool_calls": plain})
sound = st.fixed_dictionaries({"id": ids, "user": users}, optional={"rating": rating, "correction": correction})
odd = st.fixed_dictionaries(
    {"id": ids}, optional={name: plain for name in ("rating", "correction", "comment", "user", "score")}
)
good = st.sampled_from([{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}])
message = good | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "weight", "x"]), plain, max_size=4)
sound_whole = st.fixed_dictionaries(
    {"messages": st.lists(good, min_size=1, max_size=4)},
    optional={"id": st.sampled_from(["a", "b", "KEY", "fb-a-0"]), "user": users, "rating": rating, "rejected": texts},
)
odd_whole = st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=4) | plain},
    optional={name: plain for name in ("id", "user", "weight", "train_on", "tools", "meta", "rejected", "chosen")},
)
tokens = st.sampled_from(["KEY", "", "Bearer", "Bearer x", "basic x", "Bearer KEY\x00"])


class FeedbackBodies:
    """POST and GET /v1/feedback."""

    name, size = "feedback over HTTP", 1
    cases = st.one_of(
        *(st.tuples(st.just("post"), one) for one in (sound, sound, odd, sound_whole, odd_whole, plain)),
        st.tuples(st.just("raw"), st.binary(max_size=64) | plain.map(lambda value: repr(value).encode())),
        st.tuples(st.just("get"), ids),
        st.tuples(st.just("key"), tokens),
    )

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(url)
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._patch = pytest.MonkeyPatch()
        self._app: Running = self._loop.run_until_complete(
            self._stack.enter_async_context(running(url, self._patch, per_minute=10**9))
        )
        self._cases = 0

    def close(self) -> None:
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._patch.undo()
        self._redis.close()

    def take(self, case: tuple[str, Any]) -> Counter[str]:
        return self._loop.run_until_complete(self._take(*case))

    async def _take(self, kind: str, value: Any) -> Counter[str]:
        if self._cases % EVERY == 0:
            await self._records()
        self._cases += 1
        answer = await self._send(kind, value)
        assert answer.status_code in ALLOWED, (answer.status_code, answer.text)
        if kind == "key":
            assert answer.status_code == 401
        assert SECRET not in answer.text and self._redis.get(keys.completion(self._hidden)) == self._sealed
        said = answer.json()
        if answer.status_code == 202 and said["state"] != "withdrawn":
            where = await self._app.client.get(f"/v1/feedback/{said['id']}")
            assert where.status_code == 200 and self._redis.lpos("rq:queue:feedback", said["id"]) is not None, "lost"
        elif answer.status_code >= 400:
            assert said["error"]["message"] and said["error"]["code"] == answer.status_code
        return Counter([str(answer.status_code)])

    async def _records(self) -> None:
        """An empty Redis with three records: of the key that is used, of another, and of one that is never named."""
        self._redis.flushall()
        self._keys = {"KEY": await self._app.key(user="a"), "OTHER": await self._app.key(user="b")}
        body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
        hidden = await self._app.client.post("/v1/chat/completions", json=body)
        self._hidden = hidden.headers["x-tandem-completion"]
        assert KEY_PATTERN.fullmatch(self._hidden)
        while (sealed := self._redis.get(keys.completion(self._hidden))) is None:
            await asyncio.sleep(0.001)
        self._sealed = sealed

    async def _send(self, kind: str, value: Any) -> httpx.Response:
        client = self._app.client
        if kind == "raw":
            return await client.post("/v1/feedback", content=value)
        if kind == "get":
            shown = self._keys.get(value, str(value)) if isinstance(value, str) else str(value)
            name = quote(shown.encode(errors="replace"), safe="") or "-"
            return await client.get(f"/v1/feedback/{name}")
        if kind == "key":
            return await client.post("/v1/feedback", json={}, headers={"authorization": value.encode()})
        if isinstance(value, dict) and isinstance(value.get("id"), str):
            value = value | {"id": self._keys.get(value["id"], value["id"])}
        try:
            body = json.dumps(value, allow_nan=True).encode()
        except (TypeError, ValueError, RecursionError):
            body = repr(value).encode(errors="replace")
        return await client.post("/v1/feedback", content=body)
