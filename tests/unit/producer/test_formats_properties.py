"""Any record of any format: read, or refused by an error of ours; and what is never learnt, whatever the format."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from import_parts import lines, read

from producer.errors import InvalidTranscriptError
from producer.formats import READ, LeaveOut, Reason, by_name
from producer.formats.record import Pairs
from producer.imports import AUTO
from producer.jsonl import NotTranscriptsError
from producer.transcript import Transcript, trained_turns

WORDS = sorted({
    *("messages", "role", "content", "user", "assistant", "from", "value", "human", "gpt", "conversations", "prompt"),
    *("completion", "label", "chosen", "rejected", "input", "output", "inputs", "outputs", "instruction", "history"),
    *("response", "choices", "message", "data", "rating", "meta", "message_id", "snapshot", "chat", "scores", "name"),
    *("feedback", "feedback_stats", "score", "generations", "lc", "kwargs", "type", "tools", "id", "avg", "n", "text"),
    *("parentId", "system", "call_type", "preferred_output", "non_preferred_output", "function_call", "[{", "args"),
})  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
FIELDS = {
    "messages": ["messages"], "openai-preference": ["input", "preferred_output", "non_preferred_output"],
    "pairs": ["prompt", "chosen", "rejected"], "trl": ["prompt", "completion"], "sharegpt": ["conversations"],
    "openwebui": ["data", "meta", "snapshot"], "litellm": ["messages", "response"], "alpaca": ["instruction", "output"],
    "langsmith": ["inputs", "outputs"], "langfuse": ["input", "output"],
}  # fmt: skip


ROWS = [
    row
    for path in sorted((Path(__file__).parents[2] / "data" / "formats").iterdir())
    for row in (
        json.loads(path.read_text()) if path.suffix == ".json" else map(json.loads, path.read_text().splitlines())
    )
]


NASTY: list[Any] = [None, [], {}, "x", 0, True, [[]], [{}], {"x": []}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a record."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(row: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`row` with `value` at `path`, which may be a new key."""
    if not path:
        return value
    inner = changed(row.get(path[0]) if isinstance(row, dict) else row[path[0]], path[1:], value)
    if isinstance(row, dict):
        return row | {path[0]: inner}
    return [inner if index == path[0] else item for index, item in enumerate(row)]


def take(value: Any) -> None:
    """Whatever `value` is, each format that it may be of reads it, or refuses it by an error of ours."""
    for found in READ:
        if not isinstance(value, dict) or not found.matches(value):
            continue
        before = copy.deepcopy(value)
        try:
            record = found.read(value)
            Transcript.from_dict(record.transcript())
        except (InvalidTranscriptError, LeaveOut):
            pass
        assert value == before, "what is read is not changed"


@pytest.mark.parametrize("nasty", NASTY, ids=str)
def test_anything_wrong_anywhere_is_an_error_of_ours(nasty: Any) -> None:
    for row in ROWS:
        for path in places(row):
            take(changed(row, path, nasty))


BARE = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.fixed_dictionaries({field: ODD for field in FIELDS[name]})
)


@example({"input": "q", "output": {"type": []}}, 0, [], {"input": "q", "output": {"type": []}})
@given(st.sampled_from(ROWS) | BARE, st.integers(0), st.lists(st.sampled_from(WORDS), max_size=2), ODD)
def test_any_record_is_read_or_refused_by_an_error_of_ours(row: Any, place: int, words: list[str], odd: Any) -> None:
    """Something else stands at a place, or under words that were not there."""
    known = list(places(row))
    path = known[place % len(known)]
    value = odd
    for word in reversed(words):
        value = {word: value}
    take(changed(row, path, value))


@given(st.binary(max_size=80) | st.lists(ODD, max_size=4).map(lambda rows: lines(*rows)) | ODD.map(lines))
@example(b"[" * 100_000)
@example(b'{"messages": ' + b"[" * 100_000)
@example(b"{\n" * 50_000)
@example(b'{"inputs": {"input": "q"}, "outputs": ' + b'{"output":' * 500 + b"1" + b"}" * 501)
@example(b'{"instruction": "q", "output": "a", "rating": ' + b'{"rating":' * 400 + b"1" + b"}" * 401)
def test_any_file_is_read_or_refused_by_an_error_of_ours(data: bytes) -> None:
    for name in (AUTO, "langfuse"):
        try:
            source, found = read(data, name)
        except NotTranscriptsError:
            continue
        assert all(isinstance(item, Transcript | ValueError) for _, item in found)
        assert source.left_out.total() + len(found) <= max(
            1, data.count(b"\n") + data.count(b",") + data.count(b"[") + 2
        )


# The same conversation in every format, and what is never learnt

TEXT = st.text("abc xyz.é\n", min_size=1, max_size=12).map(str.strip).filter(bool)
ASKED = st.lists(st.tuples(TEXT, TEXT), max_size=2)


def chat(asked: list[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in asked]
    return [message for pair in turns for message in pair] + [{"role": "user", "content": question}]


def written(name: str, asked: list[tuple[str, str]], question: str, answer: str, rating: int | None) -> dict[str, Any]:
    """A record of a format, with or without a rating as that format has it."""
    talk, said = chat(asked, question), {"role": "assistant", "content": answer}
    beside: dict[str, Any] = {} if rating is None else {"rating": rating}
    if name == "messages":
        return {"messages": [*talk, said], "train_on": "last"} | beside
    if name == "trl":
        return {"prompt": talk, "completion": [said]} | ({} if rating is None else {"label": rating > 0})
    if name == "sharegpt":
        roles = {"user": "human", "assistant": "gpt"}
        turns = [{"from": roles[m["role"]], "value": m["content"]} for m in [*talk, said]]
        return {"conversations": turns} | beside
    if name == "alpaca":
        return {"instruction": question, "output": answer, "history": [list(pair) for pair in asked]} | beside
    if name == "litellm":
        return {"call_type": "completion", "messages": talk, "response": {"choices": [{"message": said}]}} | beside
    if name == "langsmith":
        stats = {} if rating is None else {"feedback_stats": {"user_score": {"n": 1, "avg": max(rating, 0)}}}
        return {"inputs": {"messages": talk}, "outputs": {"message": said}} | stats
    if name == "langfuse":
        scores = [] if rating is None else [{"name": "user-feedback", "value": max(rating, 0)}]
        return {"input": {"messages": talk}, "output": said, "scores": scores}
    assert name == "openwebui"
    history = {str(i): message | {"parentId": str(i - 1) if i else None} for i, message in enumerate([*talk, said])}
    return {
        "data": {"rating": 1 if rating is None else rating},
        "meta": {"message_id": str(len(talk))},
        "snapshot": {"chat": {"chat": {"history": {"messages": history}}}},
    }


CONVERSATIONS = sorted(FIELDS.keys() - {"pairs", "openai-preference"})


@given(ASKED, TEXT, TEXT, st.sampled_from([None, 1]))
def test_a_conversation_is_the_same_from_every_format(
    asked: list[tuple[str, str]], question: str, answer: str, rating: int | None
) -> None:
    wanted = [*chat(asked, question), {"role": "assistant", "content": answer}]
    for name in CONVERSATIONS:
        source, ((_, found),) = read(lines(written(name, asked, question, answer, rating)))
        assert source.format is by_name[name] and isinstance(found, Transcript), (name, found)
        assert found.messages == wanted, name
        trained = trained_turns(found.messages, found.train_on)
        assert trained[-1] == len(wanted) - 1 and (name == "sharegpt" or len(trained) == 1)


@given(ASKED, TEXT, TEXT, st.booleans(), st.sampled_from(["learn", "chosen", "leave-out"]))
def test_a_disliked_answer_is_never_one_to_give(
    asked: list[tuple[str, str]], question: str, answer: str, array: bool, pairs: Pairs
) -> None:
    for name in CONVERSATIONS:
        rows = [written(name, asked, question, answer, -1)] * 2
        data = json.dumps(rows).encode() if array else lines(*rows)
        for format_name in (AUTO, name):
            _, found = read(data, format_name, pairs=pairs)
            assert [item.kind for _, item in found if isinstance(item, Transcript)] == ["disliked"] * 2, name
            source, found = read(data, format_name, dislikes=False, pairs=pairs)
            assert (found, source.left_out) == ([], {Reason.DISLIKED: 2}), name


@given(ASKED, TEXT, TEXT, st.integers(0, 4))
def test_a_rejected_answer_is_only_ever_the_rejected_one(
    asked: list[tuple[str, str]], question: str, answer: str, form: int
) -> None:
    talk, good, bad = chat(asked, question), f"good {answer}", f"BAD {answer}"
    better, worse = [{"role": "assistant", "content": good}], [{"role": "assistant", "content": bad}]
    pair: dict[str, Any] = [
        {"input": {"messages": talk}, "preferred_output": better, "non_preferred_output": worse},
        {"prompt": talk, "chosen": better, "rejected": worse},
        {"chosen": [*talk, *better], "rejected": [*talk, *worse]},
        {"instruction": question, "chosen": good, "rejected": bad, "history": [list(turn) for turn in asked]},
        {"messages": talk, "chosen": good, "rejected": bad, "train_on": "last"},
    ][form]
    for pairs, kind in (("learn", "correction"), ("chosen", "demonstration")):
        _, ((_, found),) = read(lines(pair), pairs=pairs)  # type: ignore[arg-type]
        assert isinstance(found, Transcript) and (found.kind, found.messages) == (kind, [*talk, *better])
        assert trained_turns(found.messages, found.train_on) == [len(talk)]
        assert found.rejected == (worse[0] if kind == "correction" else None)
    source, none = read(lines(pair), pairs="leave-out")
    assert (none, source.left_out) == ([], {Reason.PAIR: 1})
    _, ((_, both),) = read(lines(pair | {"rating": -1}))
    assert "comes beside rejected" in str(both), "two things at once"
