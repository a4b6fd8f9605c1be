"""Requests and answers of the three APIs, read as one conversation that `producer` accepts.

The bytes of answers have the form in which vLLM 0.32 sends them, tool calls and reasoning included; the same for text
from a running vLLM: tests/server/test_recorded_completions.py.
"""

import json
from typing import Any

import pytest

from producer.completions import Completion
from producer.transcript import Transcript
from worker.serving.vllm.feedback import answers, requests

CALL = {"id": "c1", "type": "function", "function": {"name": "hours", "arguments": '{"day": "Mon"}'}}
TOOL = {"type": "function", "function": {"name": "hours", "parameters": {"type": "object"}}}


def chat(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "?"}]} | more).encode()


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def chunk(**delta: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta}]}


STREAMED = sse(
    chunk(role="assistant", content=""),
    chunk(reasoning="Let me "),
    chunk(reasoning="see."),
    chunk(content="I "),
    chunk(content="look."),
    chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "hours", "arguments": ""}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"day": '}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Mon"}'}}]),
    {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 9}},
)
WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "I look.",
                    "reasoning": "Let me see.",
                    "tool_calls": [CALL],
                    "refusal": None,
                    "annotations": None,
                },
            }
        ],
    }
).encode()


@pytest.mark.parametrize(("body", "streamed"), [(WHOLE, False), (STREAMED, True)])
def test_reasoning_and_tool_calls_are_the_messages(body: bytes, streamed: bool) -> None:
    name, (answer,) = answers.read("chat", body, streamed)
    assert name == "chatcmpl-1"
    assert answer == {"role": "assistant", "content": "I look.", "reasoning": "Let me see.", "tool_calls": [CALL]}
    kept = Completion(
        id=name, created=1.0, model="m", messages=[{"role": "user", "content": "?"}], answer=answer, tools=[TOOL]
    )
    transcript = Transcript(messages=[*kept.messages, kept.answer], rating=-1, tools=kept.tools)
    assert transcript.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"day": "Mon"}
    assert transcript.messages[-1]["reasoning_content"] == "Let me see."


def test_choices_of_a_stream_are_told_apart() -> None:
    events = [
        {"id": "cmpl-1", "choices": [{"index": index, "text": text}]}
        for index, text in [(1, "b"), (0, "a"), (1, "B"), (0, "A")]
    ]
    _, said = answers.read("text", sse(*events), True)
    assert [one and one["content"] for one in said] == ["aA", "bB"]


RESPONSE = {
    "id": "resp_1",
    "status": "completed",
    "error": None,
    "output": [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "name": "hours", "arguments": '{"day": "Mon"}', "call_id": "c1"},
    ],
}
EVENTS = [
    {"type": "response.created", "response": {"id": "resp_1", "status": "in_progress", "output": []}},
    {"type": "response.reasoning_text.delta", "delta": "Hm."},
    {"type": "response.output_text.delta", "delta": "I "},
    {"type": "response.output_text.delta", "delta": "look."},
    {"type": "response.completed", "response": RESPONSE},
]
EXPECTED = {"role": "assistant", "content": "I look.", "reasoning": "Hm.", "tool_calls": [CALL]}


@pytest.mark.parametrize(("body", "streamed"), [(json.dumps(RESPONSE).encode(), False), (sse(*EVENTS), True)])
def test_a_response_is_one_message(body: bytes, streamed: bool) -> None:
    assert answers.read("responses", body, streamed) == ("resp_1", [EXPECTED])


def test_a_stream_that_was_cut_short_has_what_had_come() -> None:
    cut = sse(*EVENTS[:-1]) + b'data: {"type": "response.output_text.del'
    assert answers.read("responses", cut, True)[1] == [{"role": "assistant", "content": "I look.", "reasoning": "Hm."}]
    assert answers.read("chat", STREAMED[:-200], True)[1][0] is not None


@pytest.mark.parametrize(
    "body",
    [
        sse(chunk(content="half"), {"error": {"message": "torn"}}),
        sse(),
        b"data: {bad\n\n",
        sse(chunk(role="assistant", content="")),
    ],
)
def test_an_error_or_nothing_is_no_answer(body: bytes) -> None:
    assert not any(answers.read("chat", body, True)[1])


@pytest.mark.parametrize("body", [b"null", b"{", b"[]", b"[" * 100_000, b'{"choices": 3}', b'{"error": {"code": 500}}'])
@pytest.mark.parametrize("api", ["chat", "text", "responses"])
def test_what_is_no_answer_is_none(api: requests.Api, body: bytes) -> None:
    assert not any(answers.read(api, body, False)[1])


@pytest.mark.parametrize(
    ("header", "body", "newest", "expected"),
    [
        ("3", b"", None, (3, 3)),
        ("3-5", b"", None, (3, 5)),
        ("3", b"data: {}\n\n: weight-version 3-4\n\n", None, (3, 4)),
        ("3", b": weight-version 2\n\n", None, (2, 2)),
        ("3", b"data: {}\n\n", 6, (3, 6)),
        ("3", b'data: {"content": ": weight-version 9"}\n\n: weight-version 3\n\n', None, (3, 3)),
        ("", b"", None, (0, 0)),
    ],
)
def test_versions(header: str, body: bytes, newest: int | None, expected: tuple[int, int]) -> None:
    assert answers.span(header, body, newest) == expected


# Requests


def test_a_chat_request_is_kept_as_it_was() -> None:
    extra = {"enable_thinking": False}
    body = chat(user="u", n=2, tools=[TOOL], chat_template_kwargs=extra, reasoning_effort="low", temperature=0.3)
    asked = requests.read("chat", body)
    assert asked is not None and asked.messages == [{"role": "user", "content": "?"}]
    assert (asked.model, asked.user, asked.choices, asked.tools) == ("m", "u", 2, [TOOL])
    assert asked.kwargs == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    "more",
    [
        {"store": False},
        {"store": 0},
        {"store": "false"},
        {"echo": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"chat_template": "{{ x }}"},
        {"documents": [{"text": "x"}]},
        {"use_beam_search": True},
        {"n": 100},
        {"n": "2"},
        {"messages": "text"},
        {"messages": []},
    ],
)
def test_what_cannot_be_kept_is_not(more: dict[str, Any]) -> None:
    assert requests.read("chat", chat(**more)) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (9 << 20)])
@pytest.mark.parametrize("api", ["chat", "text", "responses"])
def test_what_is_no_request_is_not_kept(api: requests.Api, body: bytes) -> None:
    assert requests.read(api, body) is None


@pytest.mark.parametrize(("prompt", "kept"), [("Once", True), (["Once"], True), (["a", "b"], False), ([1, 2], False)])
def test_a_prompt_is_kept_as_what_a_user_said(prompt: Any, kept: bool) -> None:
    asked = requests.read("text", json.dumps({"prompt": prompt}).encode())
    assert (asked.messages if asked else None) == ([{"role": "user", "content": "Once"}] if kept else None)


def test_items_of_a_response_are_messages() -> None:
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "When?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "name": "hours", "arguments": '{"day": "Mon"}', "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
    ]
    function = TOOL["function"]
    tools = [{"type": "function", "strict": None} | function]  # type: ignore[operator]
    asked = requests.read("responses", json.dumps({"input": items, "instructions": "Hi.", "tools": tools}).encode())
    assert asked is not None and asked.tools == [TOOL]
    assert asked.messages == [
        {"role": "system", "content": "Hi."},
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "When?"}]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "reasoning": "Hm.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
    ]
    said = Transcript(messages=[*asked.messages, {"role": "assistant", "content": "At noon."}], rating=1)
    assert said.messages[3]["reasoning_content"] == "Hm."


@pytest.mark.parametrize("item", [{"type": "item_reference", "id": "x"}, {"type": "computer_call"}, "text", 5])
def test_an_item_that_is_no_message_is_not_kept(item: Any) -> None:
    assert requests.read("responses", json.dumps({"input": [item]}).encode()) is None
