"""scripts/integrations/tandem_litellm.py: the key of a recorded answer, as LiteLLM hands its headers on.

LiteLLM is not installed here. Its base class has no behaviour that counts, and the shapes of what it passes are those
of LiteLLM 1.110.2, where this module was run with `completion`, `acompletion`, streams and the proxy.
"""

import asyncio
import importlib
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from feedback_app import QUESTION, Running, running

from producer import Producer
from producer.outcomes import Outcome


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on a LiteLLM that has the one class which it imports."""
    names = ("litellm", "litellm.integrations", "litellm.integrations.custom_logger")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].CustomLogger = type("CustomLogger", (), {})  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "integrations.tandem_litellm", raising=False)
    yield importlib.import_module("integrations.tandem_litellm")
    sys.modules.pop("integrations.tandem_litellm", None)


def response(headers: dict[str, str]) -> Any:
    """A response or a stream of LiteLLM's, with the headers of the server."""
    shown = {f"llm_provider-{name}": value for name, value in headers.items()}
    return SimpleNamespace(id="chatcmpl-1", _hidden_params={"additional_headers": shown})


def asked(**more: Any) -> dict[str, Any]:
    """What LiteLLM passes to a callback of the request."""
    given = {"litellm_params": {"metadata": {"chat": "c1"}}, "optional_params": {"user": "u7"}}
    return given | {"litellm_call_id": "call-1"} | more


def test_an_answer_is_rated_by_the_key_that_the_callback_kept(
    module: Any, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(app: Running) -> None:
        body = {"model": "m", "messages": QUESTION}
        answer = await app.client.post("/v1/chat/completions", json=body)
        kept: list[Any] = []
        await module.TandemKeys(kept.append).async_log_success_event(asked(), response(dict(answer.headers)), 0, 0)
        (completed,) = kept
        assert completed == module.Completed(
            [answer.headers["x-tandem-completion"]], "chatcmpl-1", "call-1", "u7", {"chat": "c1"}
        )
        sent = await app.say({"id": completed.keys[0], "rating": -1, "user": completed.user})
        assert sent.status_code == 202

        def again() -> Outcome:
            with Producer(redis_url) as producer:
                return producer.rate(completed.keys[0], -1, user="u7").outcome

        assert await asyncio.to_thread(again) is Outcome.KNOWN

    async def whole() -> None:
        async with running(redis_url, monkeypatch) as app:
            await scene(app)

    asyncio.run(whole())


def test_several_choices_have_a_key_each_and_the_proxy_sends_them_on(module: Any) -> None:
    answer = response({"x-tandem-completion": "one, two"})
    assert module.keys_of(answer) == ["one", "two"]
    hook = module.tandem.async_post_call_response_headers_hook
    sent = asyncio.run(hook(data={}, user_api_key_dict=None, response=answer, litellm_call_info={}))
    assert sent == {"X-Tandem-Completion": "one, two"}
    assert asyncio.run(hook(data={}, user_api_key_dict=None, response=None)) is None


def test_headers_are_found_in_the_request_too(module: Any) -> None:
    kept: list[Any] = []
    bare = SimpleNamespace(id="chatcmpl-1", _hidden_params={})
    module.TandemKeys(kept.append).log_success_event(asked(response_headers={"X-Tandem-Completion": "k"}), bare, 0, 0)
    assert [one.keys for one in kept] == [["k"]]


@pytest.mark.parametrize(
    "answer", [None, SimpleNamespace(), response({}), SimpleNamespace(_hidden_params={"headers": 1})]
)
def test_what_is_not_recorded_has_no_key(module: Any, answer: Any) -> None:
    kept: list[Any] = []
    assert module.keys_of(answer) == []
    module.TandemKeys(kept.append).log_success_event({}, answer, 0, 0)
    assert kept == []


def test_what_fails_while_it_keeps_costs_no_answer(module: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: Any) -> None:
        raise OSError("full")

    async def waits(completed: Any) -> None:
        kept.append(completed.keys)

    kept: list[list[str]] = []
    answer = response({"x-tandem-completion": "a-key"})
    with caplog.at_level(logging.ERROR, "tandem.litellm"):
        module.TandemKeys(fails).log_success_event(asked(), answer, 0, 0)
        asyncio.run(module.TandemKeys(fails).async_log_success_event(asked(), answer, 0, 0))
        module.TandemKeys(waits).log_success_event(asked(), answer, 0, 0)
        asyncio.run(module.TandemKeys(waits).async_log_success_event(asked(), answer, 0, 0))
    assert kept == [["a-key"]] and len(caplog.records) == 3 and "not awaited" in caplog.text
    assert "a-key" not in caplog.text
