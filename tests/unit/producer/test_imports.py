"""Files as `tandem enqueue` reads them: their shape, their format, and what is wrong with them."""

import gzip
import json
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from import_parts import Pieces, lines, read

from producer import json_values
from producer.formats import by_name
from producer.imports import AUTO, Import
from producer.jsonl import NotTranscriptsError, is_json_over_lines
from producer.transcript import Transcript

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHARE = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "q", "output": "a"}


def refused(data: bytes, format_name: str = AUTO) -> str:
    with pytest.raises(NotTranscriptsError) as caught:
        read(data, format_name)
    assert str(caught.value).startswith("f") and "\n" not in str(caught.value)
    return str(caught.value)


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
        (b"question,answer\nq,a\n", "looks like a CSV (2 columns): convert it"),
        (b"\xef\xbb\xbfquestion\tanswer\nq\ta", "looks like a TSV (2 columns)"),
        (b"Dear all,\nthis is secret, very", "looks like plain text"),
        (b'"secret";"x"\n"a";"b"', "looks like a CSV with semicolons (2 columns)"),
        (b"# Notes\n", "looks like plain text"),
        (b"<html>secret", "looks like XML or HTML"),
        (gzip.compress(b"secret", mtime=0), "looks like gzip: unpack it (gunzip"),
        (b"PK\x03\x04secret", "looks like a ZIP archive"),
        (b"PAR1secret", "looks like Parquet"),
        (json.dumps(GOOD).encode("utf-16"), "looks like text in UTF-16"),
        (b"\x00\x01secret", "looks like binary data"),
        (b"{'messages': [{'role': 'user'}]}", "looks like Python's own way to print a dict"),
        (b'"secret"\n"b"', "looks like JSON values that are no objects (str)"),
        (
            b'{"q": "secret", "a": "b"}\n' * 3,
            "looks like JSON objects with the fields 'q', 'a'. Known formats: messages",
        ),
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


def test_a_record_that_two_formats_fit_is_of_the_more_special_one() -> None:
    """Otherwise the instruction would be lost here."""
    talk = {"input": "q", "output": "a"}
    source, found = read(lines(talk, talk | {"instruction": "Translate."}))
    assert source.format is by_name["langfuse"] and "changes from traces of Langfuse to Alpaca's" in str(found[1][1])


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        (
            "preference_formats",
            [
                *["correction Canberra.", "correction Canberra.", "disliked Sydney.", "demonstration Canberra."],
                *["disliked Sydney.", "disliked Sydney."],
            ],
        ),
        ("other_transcript_shapes", [*["demonstration y"] * 5, "LibreChat", "Responses API"]),
    ],
)
def test_each_line_of_what_people_have_as_a_file_of_its_own(name: str, becomes: list[str]) -> None:
    rows = (Path(__file__).parents[2] / "data" / "client_logs" / f"{name}.jsonl").read_bytes().splitlines()
    for row, wanted in zip(rows, becomes, strict=True):
        if wanted in ("LibreChat", "Responses API"):
            assert wanted in refused(row)
            continue
        _, ((_, found),) = read(row)
        assert isinstance(found, Transcript) and f"{found.kind} {found.messages[-1]['content']}" == wanted


def test_a_format_that_is_named_is_the_only_one() -> None:
    _, found = read(lines(ALPACA), "sharegpt")
    assert "changes from ShareGPT's" in str(found[0][1])
    _, found = read(lines({"a": 1}, ALPACA), "alpaca")
    assert "holds none of Alpaca's instructions" in str(found[0][1]) and isinstance(found[1][1], Transcript)


def test_ratings_in_stars_end_the_file_before_anything_of_their_block_is_queued() -> None:
    """On such a scale a 1, which comes first here, is the worst."""
    data = lines(*(GOOD | {"rating": stars} for stars in (1, 1, 5)))
    for size, says in ((None, "Nothing was queued"), (1 << 20, "read together with this record was not queued")):
        with pytest.raises(NotTranscriptsError) as caught:
            read(data, size=size)
        assert str(caught.value).startswith("f:3: rating: is a rating beyond -1 to 1") and says in str(caught.value)


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("format_name", [AUTO, "messages"])
def test_stars_in_the_last_record_of_a_long_file_are_found_before_anything_is_handed_on(
    array: bool, format_name: str
) -> None:
    """Of a pipe, the blocks before that are handed on, which docs/formats.md says."""
    rows = [GOOD | {"rating": 1, "meta": {"text": "x" * 10_000}}] * 300 + [GOOD | {"rating": 5}]
    data = json.dumps(rows).encode() if array else lines(*rows)
    for file, before in ((BytesIO(data), False), (Pieces(data, 1 << 20), True)):
        source = Import(BufferedReader(file), "f", format_name)  # type: ignore[type-var]
        handed_on = 0
        with pytest.raises(NotTranscriptsError, match="beyond -1 to 1"):
            for items, _size in source.blocks():
                handed_on += len(items)
        assert (handed_on > 0) == before


def test_a_file_that_was_begun_is_read_from_there() -> None:
    file = BytesIO(b"something before\n" + lines(GOOD, GOOD | {"rating": 1}))
    file.readline()
    found = [item for items, _size in Import(BufferedReader(file), "f").blocks() for _, item in items]
    assert [isinstance(item, Transcript) and item.kind for item in found] == ["demonstration", "liked"]


def test_a_rating_of_an_own_line_is_a_transcripts_rating() -> None:
    for row in (GOOD | {"rating": 0.5, "weight": 0.5}, GOOD | {"thumbs": "up", "weight": 0.5}):
        _, ((_, found),) = read(lines(row))
        assert isinstance(found, Transcript) and found.kind == "liked" and found.weight == 0.5
        assert found.rating == row.get("rating", 1.0)
