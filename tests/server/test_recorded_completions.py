"""Completions of a real vLLM are kept in a real Redis as they were sampled, and the client sees nothing of it."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from feedback_parts import CONVERSATION, Answer, ask, record

from producer.errors import UnknownCompletionError
from worker.testing.redis_server import RedisServer

pytestmark = pytest.mark.server

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@pytest.fixture
def store(kept: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(kept.url) as client:
        yield client


def request(server: Any, path: str, **more: Any) -> Answer:
    """A completion of 12 tokens, greedy, with sampled tokens and log-probabilities in the answer."""
    body: dict[str, Any] = {"model": str(server.model_dir), "temperature": 0, "user": "u-1"}
    if path == RESPONSES:
        body |= {"input": "Who are you?", "instructions": "Be short.", "max_output_tokens": 12}
    elif path == TEXT:
        body |= {"prompt": "Once upon", "max_tokens": 12, "ignore_eos": True}
    else:
        body |= {"messages": CONVERSATION, "max_tokens": 12, "ignore_eos": True}
    answer = ask(server.url, path, body | more)
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_kept_as_it_was_sampled(server: Any, store: redis.Redis, stream: bool) -> None:
    answer = request(server, CHAT, logprobs=True, return_token_ids=True, stream=stream)
    (key,) = answer.keys
    kept = record(store, key)
    chunks = answer.events if stream else [answer.json]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids") or ()]
    scored = [at["logprob"] for choice in choices for at in (choice.get("logprobs") or {}).get("content", ())]
    text = "".join((choice.get("delta") or choice.get("message"))["content"] or "" for choice in choices)
    assert len(tokens) == 12 and kept.token_ids == tokens
    assert kept.logprobs is not None and kept.logprobs == pytest.approx(scored, abs=1e-6)
    assert kept.answer == {"role": "assistant", "content": text} and kept.messages == CONVERSATION
    assert (kept.id, kept.model, kept.user) == (chunks[0]["id"], str(server.model_dir), "u-1")
    version = int(answer.headers["x-weight-version"])
    assert kept.versions == (version, version) and kept.key == key


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_what_the_client_did_not_ask_for_it_does_not_see(
    server: Any, store: redis.Redis, path: str, stream: bool
) -> None:
    """Tokens and log-probabilities are kept though none were asked for; the answer is that of a request that is not
    kept, but for ids and times."""
    kept, plain = request(server, path, stream=stream), request(server, path, stream=stream, store=False)
    assert len(kept.keys) == 1 and plain.keys == []
    assert shape(kept) == shape(plain)
    found = record(store, kept.keys[0])
    assert found.token_ids and found.logprobs is not None and len(found.logprobs) == len(found.token_ids)
    assert all(math.isfinite(one) and one <= 0 for one in found.logprobs) and found.answer["content"]
    asked = {CHAT: CONVERSATION, RESPONSES: CONVERSATION, TEXT: [{"role": "user", "content": "Once upon"}]}
    assert found.messages == asked[path]


def shape(answer: Answer) -> Any:
    """An answer without what differs from request to request. A stream's pieces depend on the moment; its text not."""
    if "text/event-stream" not in answer.headers["content-type"]:
        return without_ids(answer.json)
    said = "".join(delta(event) for event in answer.events)
    return said, sorted({name for event in answer.events for name in event}), answer.body.count(b'logprob"')


def delta(event: dict[str, Any]) -> str:
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    return "".join((one.get("delta") or {}).get("content") or one.get("text") or "" for one in event.get("choices", ()))


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        changing = ("id", "created", "created_at", "completed_at", "request_id", "store", "user")
        return {name: without_ids(item) for name, item in value.items() if name not in changing}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_each_of_several_choices_has_a_record_of_its_own(server: Any, store: redis.Redis) -> None:
    answer = request(server, CHAT, n=3, temperature=1.0, seed=5, return_token_ids=True)
    assert len(set(answer.keys)) == 3
    for key, choice in zip(answer.keys, answer.json["choices"], strict=True):
        kept = record(store, key)
        assert kept.token_ids == choice["token_ids"] and kept.answer["content"] == choice["message"]["content"]
    assert len({tuple(record(store, key).token_ids) for key in answer.keys}) == 3


def test_a_clients_id_names_no_record(server: Any, store: redis.Redis) -> None:
    """The same X-Request-Id twice: two records, and neither is to be had by the id."""
    from producer.completions import load

    first = ask(server.url, CHAT, body(server, "one"), X_Request_Id="chosen")
    second = ask(server.url, CHAT, body(server, "two"), X_Request_Id="chosen")
    assert first.json["id"] == second.json["id"] == "chatcmpl-chosen"
    assert record(store, first.keys[0]).messages[0]["content"] == "one"
    assert record(store, second.keys[0]).messages[0]["content"] == "two"
    for guess in ("chosen", "chatcmpl-chosen"):
        with pytest.raises(UnknownCompletionError):
            load(store, guess)


def body(server: Any, text: str, **more: Any) -> dict[str, Any]:
    return {"model": str(server.model_dir), "messages": [{"role": "user", "content": text}], "max_tokens": 4} | more


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"store": False}),
        (CHAT, {"echo": True}),
        (TEXT, {"prompt": [1, 2, 3]}),
        (TEXT, {"prompt": ["one two three", "four five six"]}),
    ],
)
def test_what_is_not_kept_has_no_key(server: Any, store: redis.Redis, path: str, more: dict[str, Any]) -> None:
    before = store.dbsize()
    assert request(server, path, **more).keys == []
    assert record(store, request(server, CHAT).keys[0]) and store.dbsize() <= before + 3


def test_what_is_refused_has_no_key(server: Any) -> None:
    answer = ask(server.url, CHAT, body(server, "x", max_tokens=-1))
    assert answer.status == 400 and not answer.keys


def test_answers_come_while_redis_is_away_or_full(server: Any, kept: RedisServer) -> None:
    """And what waited is kept once it is back."""
    kept.stop()
    try:
        waiting = [request(server, CHAT).keys[0] for _ in range(3)]
    finally:
        kept.start()
    with redis.Redis.from_url(kept.url) as client:
        assert all(record(client, key).token_ids for key in waiting)
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used // 2)
        full = request(server, CHAT, stream=True).keys[0]
        client.config_set("maxmemory", "1gb")
        assert record(client, full).token_ids


LONG = 1500
"""Tokens of an answer that somebody goes away from."""
TRIES = 6
"""On a busy machine the whole answer may be there before the server hears that its client is gone."""


def gone_away(server: Any) -> str:
    """A client that got the first tokens of a long answer, and went as a user who presses stop: the answer's key."""
    import http.client
    from urllib.parse import urlsplit

    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    long = body(server, "go on", max_tokens=LONG, ignore_eos=True, stream=True, temperature=0)
    connection.request("POST", CHAT, json.dumps(long), {"content-type": "application/json"})
    answer = connection.getresponse()
    key = answer.headers["X-Tandem-Completion"]
    got = b""
    while got.count(b"data: ") < 8:
        got += answer.read1()
    answer.close()
    connection.close()
    return str(key)


def test_a_client_that_goes_away_leaves_what_it_had_got(server: Any, store: redis.Redis) -> None:
    for _ in range(TRIES):
        kept = record(store, gone_away(server))
        if len(kept.token_ids) < LONG:
            break
    assert 4 <= len(kept.token_ids) < LONG and kept.answer["content"]
    assert kept.logprobs is not None and len(kept.logprobs) == len(kept.token_ids)
