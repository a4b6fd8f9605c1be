"""Files as `tandem enqueue` reads them: their shape, their format, what is wrong with them; and any bytes at all."""

import copy
import gzip
import io
import json
from collections.abc import Iterator
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producer import json_values
from producer.errors import InvalidTranscriptError
from producer.formats import READ, LeaveOut, Reason, by_name
from producer.imports import AUTO, Import
from producer.jsonl import NotTranscriptsError, is_json_over_lines
from producer.transcript import Transcript, trained_turns

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "q", "output": "a"}


class Pieces(io.RawIOBase):
    """A pipe that gives `size` bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._left, self._size = data, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece, self._left = self._left[: self._size], self._left[self._size :]
        buffer[: len(piece)] = piece
        return len(piece)


def read(
    data: bytes, format_name: str = AUTO, *, chosen: bool = False, size: int | None = None
) -> tuple[Import, list[tuple[int, Transcript | ValueError]]]:
    file = BufferedReader(BytesIO(data)) if size is None else BufferedReader(Pieces(data, size))  # type: ignore[arg-type]
    source = Import(file, "f", format_name, chosen=chosen)
    return source, [item for items, _size in source.blocks() for item in items]


def refused(data: bytes, format_name: str = AUTO) -> str:
    with pytest.raises(NotTranscriptsError) as caught:
        read(data, format_name)
    assert str(caught.value).startswith("f") and "\n" not in str(caught.value)
    return str(caught.value)


def lines(*values: Any) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


# The shape of a file


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\n "])
@pytest.mark.parametrize("size", [None, 1, 4096])
def test_an_array_and_objects_over_several_lines_are_read_like_lines(
    indent: int | None, mark: str, size: int | None
) -> None:
    values = [GOOD | {"id": "a"}, GOOD | {"id": "b", "meta": {"text": 'x" , [{ \\ } ' * 30}}]
    _, found = read((mark + json.dumps(values, indent=indent)).encode(), size=size)
    assert [item.id for _, item in found] == ["a", "b"]  # type: ignore[union-attr]
    if indent:
        rows = [json.dumps(value, indent=indent) for value in values]
        _, again = read((mark + "\n".join(rows)).encode(), size=size)
        assert [item for _, item in again] == [item for _, item in found]
        assert [n for n, _ in again] == [n := 1 + mark.count("\n"), n + 1 + rows[0].count("\n")]


def test_what_is_wrong_in_an_array_is_named_by_its_line() -> None:
    text = json.dumps([GOOD, {"messages": 1}, 7, GOOD, None], indent=1)
    _, found = read(text.encode())
    bad = {n: str(item) for n, item in found if not isinstance(item, Transcript)}
    at = [i for i, line in enumerate(text.split("\n"), start=1) if line.strip(",") in (" 7", " null")]
    assert len(found) == 5 and len(bad) == 3
    assert [bad[n] for n in at] == ["record: must be an object, not int", "record: must be an object, not NoneType"]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_an_array_that_was_cut_off_is_said_to_be(cut: int) -> None:
    data = json.dumps([GOOD, GOOD]).encode()[:-cut]
    _, found = read(data)
    assert isinstance(found[0][1], Transcript) and "cut off" in str(found[-1][1])
    assert len(found) == 3 and isinstance(found[1][1], Transcript) == (cut == 1)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\{}[],\n', max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans(), st.booleans())
def test_values_come_out_as_they_went_in(
    values: list[Any], indent: int | None, block: int, array: bool, escaped: bool
) -> None:
    """However the bytes arrive; with the line where each begins."""
    if not array:
        values = [{"v": value} for value in values]
    rows = [json.dumps(value, indent=indent, ensure_ascii=escaped) for value in values]
    text = "[" + ",\n".join(rows) + "]" if array else "\n".join(rows)
    data, where = BytesIO(text.encode()), 1
    found = [item for part, _ in json_values.values(lambda: data.read(block), 1 << 20) for item in part]
    assert [json.loads(item) for _, item in found] == values  # type: ignore[arg-type]
    for row, (line, _) in zip(rows, found, strict=True):
        assert line == where
        where += row.count("\n") + 1


@given(st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"', b"\\", b",", b"a", b"\n", b" ", b"1"]), max_size=30))
@example([b"[", b"]", b"]", b"{", b"}"])
def test_no_byte_of_what_is_no_json_is_lost(pieces: list[bytes]) -> None:
    data = BytesIO(b"".join(pieces))
    found = [item for part, _ in json_values.values(lambda: data.read(3), 100) for item in part]
    kept = b"".join(item for _, item in found if isinstance(item, bytes))
    assert kept.count(b"a") == pieces.count(b"a") and kept.count(b"1") == pieces.count(b"1")


def test_a_value_that_is_too_long_is_left_out_alone() -> None:
    data = BytesIO(b'[1, {"a": "' + b"x\n" * 50 + b'"}, [2]]')
    found = [item for part, _ in json_values.values(lambda: data.read(7), 20) for item in part]
    assert found == [(1, b"1"), (1, None), (51, b"[2]")]


def test_lines_stay_lines() -> None:
    """Where only the first line is wrong, it is reported, and the others are read."""
    good = json.dumps(GOOD).encode()
    for first in (b'{"messages": [', b'{"messages"', b"{]", b"null", b"x"):
        assert is_json_over_lines(first + b"\n" + good + b"\n" + good) is False
        _, found = read(b"\n".join([first, good, good]))
        assert [isinstance(item, Transcript) for _, item in found] == [False, True, True]
    assert is_json_over_lines(b'{"messages": [\n {"role": "user",\n "content"')


# The format of a file


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"question,answer\nq,a\n", "looks like a CSV with the columns question, answer"),
        (b"\xef\xbb\xbfquestion\tanswer\nq\ta", "looks like a TSV with the columns question, answer"),
        (b"Dear all,\nthis is secret, very", "looks like plain text"),
        (b"# Notes\n", "looks like plain text"),
        (b"<html>secret", "looks like XML or HTML"),
        (gzip.compress(b"secret"), "looks like gzip: unpack it (gunzip"),
        (b"PK\x03\x04secret", "looks like a ZIP archive"),
        (b"PAR1secret", "looks like Parquet"),
        (json.dumps(GOOD).encode("utf-16"), "looks like text in UTF-16"),
        (b"\x00\x01secret", "looks like binary data"),
        (b"{'messages': [{'role': 'user'}]}", "looks like Python's own way to print a dict"),
        (b'"secret"\n"b"', "looks like JSON values that are no objects (str)"),
        (b'{"q": "secret", "a": "b"}\n' * 3, "looks like JSON objects with the fields 'q', 'a'. Known formats: openai"),
        (b'[{"prompt": "q", "chosen": "a"}]', "looks like preference pairs of TRL without rejected"),
        (b'{"mapping": {"a": 1}}', "holds conversation exports of ChatGPT (mapping), a format that Tandem does not"),
        (b'{"data": [{"inputs": {}, "outputs": {}}]}', "whose field 'data' holds runs of LangSmith"),
    ],
)
def test_a_file_of_no_format_is_refused_once_by_what_it_looks_like(data: bytes, says: str) -> None:
    assert says in refused(data) and "secret" not in refused(data)


def test_an_empty_file_holds_nothing() -> None:
    for data in (b"", b"\n \n", b"[]", b"[ ]\n"):
        source, found = read(data)
        assert (source.format, found) == (None, [])


def test_the_format_is_that_of_the_first_record_that_has_one() -> None:
    source, found = read(b"{\n" * 0 + b'{"a"\n' + lines(SHARE, SHARE | {"id": 1}))
    assert source.format is by_name["sharegpt"] and len(found) == 3 and "not valid JSON" in str(found[0][1])


def test_a_file_that_changes_its_format_says_where_and_once() -> None:
    source, found = read(lines(SHARE, SHARE | {"id": 1}, ALPACA, SHARE | {"id": 2}, GOOD, ALPACA))
    assert [n for n, item in found if isinstance(item, Transcript)] == [1, 2, 4]
    ((number, error),) = [(n, item) for n, item in found if not isinstance(item, Transcript)]
    assert number == 3
    assert "changes from ShareGPT's conversations to Alpaca's instructions" in str(error)
    assert source.strays == {"messages": 1, "alpaca": 1}


def test_a_format_that_is_named_is_the_only_one() -> None:
    _, found = read(lines(ALPACA), "sharegpt")
    assert "changes from ShareGPT's" in str(found[0][1])
    _, found = read(lines({"a": 1}, ALPACA), "alpaca")
    assert "holds none of Alpaca's instructions" in str(found[0][1]) and isinstance(found[1][1], Transcript)


def test_ratings_in_stars_end_the_file_before_anything_of_their_block_is_queued() -> None:
    """On such a scale a 1, which comes first here, is the worst."""
    rated = [GOOD | {"rating": stars} for stars in (1, 1, 5)]
    said = refused(lines(*rated))
    assert said.startswith("f:3: rating: is a rating beyond -1 to 1") and "Nothing from here on was queued" in said


def test_a_rating_of_an_own_line_is_not_in_its_transcript() -> None:
    _, ((_, found),) = read(lines(GOOD | {"rating": 1, "weight": 0.5}))
    assert isinstance(found, Transcript) and found.weight == 0.5 and not found.meta


# Any input at all

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
            Transcript.from_dict(record.demonstration(chosen=True))
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


@given(ASKED, TEXT, TEXT, st.sampled_from([-1, 0]), st.booleans(), st.booleans())
def test_a_disliked_answer_is_never_queued(
    asked: list[tuple[str, str]], question: str, answer: str, rating: int, array: bool, chosen: bool
) -> None:
    for name in CONVERSATIONS:
        rows = [written(name, asked, question, answer, rating)] * 2
        data = json.dumps(rows).encode() if array else lines(*rows)
        for format_name in (AUTO, name):
            source, found = read(data, format_name, chosen=chosen)
            assert (found, source.left_out) == ([], {Reason.DISLIKED: 2}), name


@given(ASKED, TEXT, TEXT, st.integers(0, 3))
def test_a_rejected_answer_is_never_queued_and_the_chosen_one_only_if_asked(
    asked: list[tuple[str, str]], question: str, answer: str, form: int
) -> None:
    talk, good, bad = chat(asked, question), f"good {answer}", f"BAD {answer}"
    better, worse = [{"role": "assistant", "content": good}], [{"role": "assistant", "content": bad}]
    pair: dict[str, Any] = [
        {"input": {"messages": talk}, "preferred_output": better, "non_preferred_output": worse},
        {"prompt": talk, "chosen": better, "rejected": worse},
        {"chosen": [*talk, *better], "rejected": [*talk, *worse]},
        {"instruction": question, "chosen": good, "rejected": bad, "history": [list(turn) for turn in asked]},
    ][form]
    assert read(lines(pair))[1] == [] and read(lines(pair))[0].left_out == {Reason.PAIR: 1}
    _, ((_, found),) = read(lines(pair), chosen=True)
    assert isinstance(found, Transcript) and found.messages == [*talk, *better]
    assert trained_turns(found.messages, found.train_on) == [len(talk)]
    source, disliked = read(lines(pair | {"rating": -1}), chosen=True)
    assert (disliked, source.left_out) == ([], {Reason.DISLIKED: 1})
