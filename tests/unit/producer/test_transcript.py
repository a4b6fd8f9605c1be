"""What a transcript may be, what it becomes, and that nothing else gets through."""

import copy
import json
import math
from enum import StrEnum
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer.plain import MAX_DEPTH, parse_json
from producer.serializer import MsgpackSerializer
from producer.transcript import MAX_BYTES, MAX_ID, InvalidTranscript, Transcript

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "It is."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


def with_answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


def refused(value: Any, field: str) -> InvalidTranscript:
    with pytest.raises(InvalidTranscript) as caught:
        Transcript.from_dict(value)
    assert caught.value.field == field, caught.value
    assert str(caught.value) == f"{field}: {caught.value.problem}"
    return caught.value


def test_plain_conversation_keeps_its_form() -> None:
    line = {"id": "a-1_Z", "messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]}
    transcript = Transcript.from_dict(line)
    assert transcript.to_dict() == line
    assert (transcript.train_on, transcript.weight, transcript.tools) == ("all", 1.0, None)


def test_to_dict_keeps_what_is_not_default_and_leaves_meta_to_the_job() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    line = {
        **{"id": "a", "messages": [USER, ANSWER, USER, ANSWER], "train_on": [1], "weight": 0.5, "tools": [tool]},
        **{"chat_template_kwargs": {"enable_thinking": False}, "meta": {"rating": 5}},
    }
    assert Transcript.from_dict(line).to_dict() == line
    assert "meta" not in Transcript.from_dict(line).to_dict(meta=False)


def test_what_openai_and_vllm_clients_log_is_accepted() -> None:
    """Dumps of openai 3.54's ChatCompletionMessage and ParsedChatCompletionMessage and of vLLM 0.26's ChatMessage."""
    nulls = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    openai = {"content": None, "role": "assistant", **nulls, "tool_calls": [CALL]}
    parsed_call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": ""}}
    parsed_call["function"] |= {"parsed_arguments": {"x": 1}}
    parsed = {"content": "{}", "role": "assistant", "parsed": {"a": 1}, **nulls, "tool_calls": [parsed_call]}
    vllm = {"role": "assistant", "content": "done", **nulls, "tool_calls": [], "reasoning": "so"}
    result = {"role": "tool", "tool_call_id": "c1", "name": "look", "content": [{"type": "text", "text": "ok"}]}
    got = Transcript.from_dict({"messages": [USER, openai, result, parsed, result, vllm]}).messages
    called = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    assert got[1] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert got[2] == {"role": "tool", "content": "ok", "tool_call_id": "c1", "name": "look"}
    assert got[3]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert got[5] == {"role": "assistant", "content": "done", "reasoning_content": "so"}


def test_parts_are_joined_as_the_templates_print_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": None}]
    assert Transcript.from_dict(with_answer(content=parts)).messages[1]["content"] == "ab"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_one_name(name: str) -> None:
    assert Transcript.from_dict(with_answer(content="x", **{name: "why"})).messages[1]["reasoning_content"] == "why"


def test_two_reasonings_must_agree() -> None:
    both = Transcript.from_dict(with_answer(content="x", reasoning="why", reasoning_content="why"))
    assert both.messages[1]["reasoning_content"] == "why"
    refused(with_answer(content="x", reasoning="why", reasoning_content="no"), "messages[1].reasoning")


@pytest.mark.parametrize("arguments", [{"a": [1, None]}, '{"a": [1, null]}'])
def test_tool_arguments_become_an_object(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    message = Transcript.from_dict(with_answer(tool_calls=[call])).messages[1]
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}]


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
DEEP: Any = "x"
for _ in range(100_000):
    DEEP = [DEEP]

BAD = [
    (None, "transcript"),
    ([USER, ANSWER], "transcript"),
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [USER]}, "messages"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages"),
    ({"messages": [USER, ANSWER] * 3000}, "messages"),
    ({"messages": [USER, ANSWER, "x"]}, "messages[2]"),
    ({"messages": [{"content": "x"}, ANSWER]}, "messages[0].role"),
    ({"messages": [{"role": "developer", "content": "x"}, ANSWER]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "messages[0].role"),
    ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}, ANSWER]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}, ANSWER]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}, ANSWER]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": b"x"}, ANSWER]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", 1: 2}, ANSWER]}, "messages[0]"),
    ({"messages": [USER, {**ANSWER, "refusal": "I will not"}]}, "messages[1].refusal"),
    ({"messages": [USER, {**ANSWER, "name": 5}]}, "messages[1].name"),
    ({"messages": [USER, {**ANSWER, "tool_calls": "x"}]}, "messages[1].tool_calls"),
    ({"messages": CYCLE}, "messages" + "[0]" * (MAX_DEPTH + 1)),
    ({"messages": [USER, ANSWER], "meta": {"x": DEEP}}, "meta.x" + "[0]" * MAX_DEPTH),
    ({"messages": [USER, ANSWER], "meta": {"x": {1, 2}}}, "meta.x"),
    ({"messages": [USER, ANSWER], "meta": {"x": math.nan}}, "meta.x"),
    ({"messages": [USER, ANSWER], "meta": {"x": 2**64}}, "meta.x"),
    ({"messages": [USER, ANSWER], "meta": {"x": 10**6000}}, "meta.x"),
    ({"messages": [USER, ANSWER], "meta": {"x": "y" * 70_000}}, "meta.x"),
    ({"messages": [USER, ANSWER], "meta": [1]}, "meta"),
    ({"messages": [USER, {"role": "assistant", "content": "x" * MAX_BYTES}]}, "messages[1].content"),
    ({"messages": [USER, ANSWER], "modell": "qwen"}, "modell"),
    ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools"),
    ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "tools[0].function"),
    ({"messages": [USER, ANSWER], "tools": [{"type": "x", "function": {}}]}, "tools[0].type"),
    ({"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    *[({"messages": [USER, ANSWER], "id": i}, "id") for i in ("", "a b", "a:b", "ä", "a\n", "x" * (MAX_ID + 1), 7)],
    *[
        ({"messages": [USER, ANSWER], "weight": w}, "weight")
        for w in (0, -1, 1.01, True, "1", math.nan, math.inf, 10**400, 0.0)
    ],
    *[({"messages": [USER, ANSWER], "train_on": t}, "train_on") for t in ("first", [], 1, {}, [1, 1, 1], [1, 1])],
    *[({"messages": [USER, ANSWER], "train_on": [t]}, "train_on[0]") for t in (0, 2, -1, True, "1", 1.0, 10**30)],
    ({"messages": [USER, ANSWER, {"role": "assistant", "content": ""}], "train_on": "last"}, "train_on"),
]


@pytest.mark.parametrize(("value", "field"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_named(value: Any, field: str) -> None:
    refused(value, field)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ("NaN", "NaN"),
        ('{"x": NaN}', "NaN"),
        ('{"x": 1e999}', "infinity"),
        ('{"x": ' + "9" * 5000 + "}", "too long"),
        ('{"x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested"),
        ('{"x": "\\ud800"}', "surrogate"),
        (7, "must be an object"),
    ],
)
def test_bad_tool_arguments(arguments: Any, says: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidTranscript, match=says) as caught:
        Transcript.from_dict(with_answer(tool_calls=[call]))
    assert caught.value.field.startswith("messages[1].tool_calls[0].function.arguments")


def test_errors_and_repr_never_quote_the_conversation() -> None:
    secret = "tell-nobody"
    for bad in (
        {"messages": [{"role": "user", "content": secret, "audio": {"data": secret}}, ANSWER]},
        with_answer(tool_calls=[{"function": {"name": "f", "arguments": secret}}]),
        {"messages": [{"role": secret, "content": secret}, ANSWER]},
    ):
        with pytest.raises(InvalidTranscript) as caught:
            Transcript.from_dict(bad)
        assert secret not in str(caught.value)
    assert secret not in repr(Transcript.from_dict(with_answer(content=secret)))


def test_a_client_s_object_gets_told_how_to_become_plain() -> None:
    class Message:
        role = "assistant"

    with pytest.raises(InvalidTranscript, match=r"messages\[1\]: Message is not a JSON type.*model_dump"):
        Transcript.from_dict({"messages": [USER, Message()]})


def test_constructing_validates_and_shares_nothing_with_its_input() -> None:
    messages = [dict(USER), dict(ANSWER)]
    transcript = Transcript(messages=messages)
    messages[0]["content"] = "changed"
    assert transcript.messages[0]["content"] == USER["content"]
    with pytest.raises(InvalidTranscript):
        Transcript(messages=[USER], weight=2)


def test_enums_of_strings_become_strings() -> None:
    class Role(StrEnum):
        USER = "user"

    role = Transcript.from_dict({"messages": [{"role": Role.USER, "content": "x"}, ANSWER]}).messages[0]["role"]
    assert type(role) is str


def test_indices_may_be_a_tuple_and_come_out_sorted() -> None:
    assert Transcript(messages=[USER, ANSWER, USER, ANSWER], train_on=(3, 1)).train_on == [1, 3]


@pytest.mark.parametrize("spare", [0, 1])
def test_the_limit_is_the_same_on_both_sides_of_the_queue(spare: int) -> None:
    """A wordy form just within or just over the limit: what the producer lets through, the worker must take."""
    parts = [{"type": "text", "text": "x"}] * 1000
    user = {"role": "user", "content": parts}
    fixed = Transcript.from_dict({"messages": [user, {"role": "assistant", "reasoning": "y"}]})
    used = sum(16 + len(k) + 16 + len(v) for m in fixed.messages for k, v in m.items())
    used += 16 * (3 + len(fixed.messages))  # the list, its messages, no tools, no template arguments
    text = "y" * (1 + MAX_BYTES - used + spare)
    line = {"messages": [user, {"role": "assistant", "reasoning": text}]}
    if spare:
        refused(line, "messages[1].reasoning_content")
    else:
        assert Transcript.from_dict(Transcript.from_dict(line).to_dict()).to_dict()
        assert len(msgpack.packb(Transcript.from_dict(line).to_dict())) <= MAX_BYTES


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.sampled_from(["assistant", "user", "tool", "text", "function", "\ud800", "all", "last", '{"a": 1}', "{"]),
    st.sampled_from([2**63, -(2**63) - 1, 2**64, (), set(), object()]),
)  # fmt: skip
NAMES = st.sampled_from(
    ["id", "messages", "train_on", "weight", "tools", "chat_template_kwargs", "meta", "role", "content", "name", "text"]
) | st.sampled_from(
    [
        "reasoning",
        "reasoning_content",
        "tool_calls",
        "tool_call_id",
        "type",
        "function",
        "arguments",
        "refusal",
        "parsed",
    ]
)
KEYS = NAMES | st.text(max_size=3) | st.integers()
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": st.just("f")}, optional={"arguments": ANYTHING})},
        optional={"id": st.text(max_size=3), "type": st.just("function"), "index": ANYTHING},
    ),
    max_size=2,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.text(max_size=5) | st.none() | ANYTHING,
    },
    optional={"reasoning": st.text(max_size=3), "tool_calls": CALLS, "name": st.text(max_size=3), "x": ANYTHING},
)
LIKELY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=4).map(lambda messages: [*messages, dict(ANSWER)])},
    optional={"id": st.text("ab-:", max_size=3), "train_on": st.sampled_from(["all", "last", [1], [0]]) | ANYTHING,
              "weight": st.floats() | ANYTHING, "meta": ANYTHING, "tools": ANYTHING, "chat_template_kwargs": ANYTHING},
)  # fmt: skip


@given(ANYTHING | LIKELY)
@example({"messages": [USER, ANSWER], "meta": {"a": [1.5, None, True, -(2**63)]}})
def test_anything_is_a_transcript_or_refused(value: Any) -> None:
    before = copy.copy(value)
    try:
        transcript = Transcript.from_dict(value)
    except InvalidTranscript as error:
        assert error.field and error.problem
        str(error).encode()
        return
    assert copy.copy(value) == before
    plain = transcript.to_dict()
    assert Transcript.from_dict(plain) == transcript
    assert Transcript.from_dict(MsgpackSerializer.loads(MsgpackSerializer.dumps(plain))) == transcript
    assert Transcript.from_dict(json.loads(json.dumps(plain))) == transcript


@given(st.text() | ANYTHING.map(lambda value: json.dumps(value, default=str, skipkeys=True)))
def test_parse_json_raises_only_value_error(text: str) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert len(str(error)) < 200
