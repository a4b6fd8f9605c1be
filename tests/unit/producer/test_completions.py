"""A recorded completion: what it may hold, and that whatever lies in Redis is either read as one or refused."""

import msgpack
import pytest
from completion_parts import ANSWER, QUESTION, completion, plain
from hypothesis import given
from hypothesis import strategies as st

from producer.completions import FORMAT, KEY_PATTERN, MAX_RECORD, Completion, is_key, new_key
from producer.errors import InvalidTranscriptError
from producer.serializer import MsgpackSerializer

FIELDS = ["id", "created", "model", "messages", "answer", "token_ids", "logprobs", "versions", "user", "tools"]
FIELDS += ["chat_template_kwargs"]


def test_a_key_is_random_and_safe_in_a_url() -> None:
    made = {new_key() for _ in range(1000)}
    assert len(made) == 1000 and all(KEY_PATTERN.fullmatch(key) for key in made)
    assert not any(key.startswith("-") for key in made), "a command line would take it for an option"
    assert not any(is_key(key) for key in ("", "chatcmpl-7", "a" * 21, "a" * 23, "a" * 21 + "\n", "a" * 21 + "*", None))


def test_what_is_packed_is_read_back() -> None:
    full, least = completion(), Completion(id="c", created=1, model="m", messages=QUESTION, answer=ANSWER)
    for one in (full, least):
        assert Completion.unpack(one.key, one.pack()) == one
    assert full.key != least.key and KEY_PATTERN.fullmatch(least.key)


def test_no_text_and_no_user_is_in_its_repr() -> None:
    assert repr(completion()) == "Completion(1 messages, 3 tokens)"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"key": "chatcmpl-7"}, "key"),
        ({"id": 7}, "id"),
        ({"id": "x" * 1025}, "id"),
        ({"id": "\ud800"}, "id"),
        ({"model": None}, "model"),
        ({"created": float("nan")}, "created"),
        ({"created": True}, "created"),
        ({"created": 10**400}, "created"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x" * (4 << 20)}]}, "messages[0].content"),
        ({"answer": "Goethe."}, "answer"),
        ({"answer": {"role": "user", "content": "?"}}, "answer.role"),
        ({"token_ids": [1, -1]}, "token_ids"),
        ({"token_ids": [1, 2.5]}, "token_ids"),
        ({"token_ids": "123"}, "token_ids"),
        ({"logprobs": [-1.0]}, "logprobs"),
        ({"logprobs": [-1.0, -2.0, float("-inf")]}, "logprobs"),
        ({"logprobs": [-1.0, -2.0, -(10**400)]}, "logprobs"),
        ({"logprobs": [-1.0, -2.0, 0.5]}, "logprobs"),
        ({"versions": (1,)}, "versions"),
        ({"versions": (1, -1)}, "versions"),
        ({"versions": (1, True)}, "versions"),
        ({"user": {"name": "u"}}, "user"),
        ({"tools": {"type": "function"}}, "tools"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_field(changes: dict, field: str) -> None:
    with pytest.raises(InvalidTranscriptError) as caught:
        completion(**changes)
    assert caught.value.field == field


def test_a_record_shares_nothing_with_what_it_was_made_of() -> None:
    messages = [{"role": "user", "content": "first"}]
    kept = completion(messages=messages)
    messages[0]["content"] = "second"
    assert kept.messages == [{"role": "user", "content": "first"}]


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, plain)), st.integers(0, 2) | st.just(FORMAT))
def test_a_record_with_any_fields_is_read_or_refused(changes: dict, form: object) -> None:
    """As from somebody who can write to Redis: every field may be anything."""
    one = completion()
    fields = {name: getattr(one, name) for name in FIELDS} | changes | {"format": form}
    try:
        raw = msgpack.packb(fields)
    except (OverflowError, ValueError):
        return
    check(one.key, raw)


@given(st.binary(max_size=300))
def test_a_record_of_any_bytes_is_read_or_refused(raw: bytes) -> None:
    check(new_key(), raw)


@given(st.data())
def test_a_damaged_record_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(completion().pack())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check(new_key(), bytes(raw[: data.draw(st.integers(0, len(raw)))]))


def check(key: str, raw: bytes) -> None:
    """Whatever is read is a completion that can be kept again."""
    try:
        read = Completion.unpack(key, raw)
    except InvalidTranscriptError as error:
        assert error.field and error.problem
    else:
        assert Completion.unpack(key, read.pack()) == read


def test_a_record_that_is_too_long_is_not_decoded() -> None:
    with pytest.raises(InvalidTranscriptError, match="the limit is"):
        Completion.unpack(new_key(), MsgpackSerializer.dumps(b"x" * MAX_RECORD))
