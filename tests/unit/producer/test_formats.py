"""Each format that Tandem reads, by a file of it (tests/data/formats): what becomes of every record.

In these files an answer that must not be learnt begins with BAD.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import import_parts
import pytest
from import_parts import lines

from producer.errors import InvalidTranscriptError
from producer.formats import FORMATS, READ, Reason, by_name, near_miss, recognise
from producer.formats.ratings import ScaleError, opinion
from producer.imports import AUTO, Import
from producer.transcript import Transcript, trained_turns

FOLDER = Path(__file__).parents[2] / "data" / "formats"
FILES = {path.stem: path for path in sorted(FOLDER.iterdir())}
TOOL = {
    "type": "function",
    "function": {"name": "depth", "parameters": {"type": "object", "properties": {"lake": {"type": "string"}}}},
}


def read(data: bytes, format_name: str = AUTO, **how: Any) -> tuple[Import, list[Transcript | ValueError]]:
    source, items = import_parts.read(data, format_name, **how)
    return source, [item for _number, item in items]


def short(transcript: Transcript | ValueError) -> list[str]:
    """Its messages as "u text", with + before the turns that are trained."""
    assert isinstance(transcript, Transcript), transcript
    trained = trained_turns(transcript.messages, transcript.train_on)
    shown = []
    for index, message in enumerate(transcript.messages):
        calls = [f"{call['function']['name']}{call['function']['arguments']}" for call in message.get("tool_calls", [])]
        text = " ".join(filter(None, [message.get("reasoning_content"), message["content"], *calls]))
        shown.append(f"{'+' if index in trained else ''}{message['role'][0]} {text}")
    return shown


CALL = "depth{'lake': 'Aral'}"
EXPECTED: dict[str, list[list[str]]] = {
    "messages": [
        ["s Be brief.", "u Which lake shrank?", "+a The Aral Sea."],
        ["u And another?", "a Lake Mead.", "u In Africa.", "+a Lake Chad."],
        ["s Use tools.", "u How deep is the Aral?", f"+a {CALL}", "t 42", "+a 42 metres."],
        ["u Liked?", "+a Yes."],
    ],
    "openai-preference": [["s Be brief.", "u Which river is longest?", "+a The Nile."]],
    "pairs": [
        ["u Which river is longest?", "+a The Nile."],
        ["u Which is widest?", "+a The Amazon."],
        ["u Which is oldest?", "+a Perhaps the Finke."],
        ["u Which is coldest?", "+a The Lena."],
        ["u Which is bluest?", "+a The Soca."],
        ["s Be brief.", "u Name a river.\n\nIn Asia", "+a The Ob."],
    ],
    "trl": [
        ["u Which hill is that?", "+a Box Hill."],
        ["u The hill is called", "+a Box Hill."],
        ["u Is it high?", "+a 224 metres."],
        ["u How deep?", f"+a {CALL}", "t 42", "+a 42 metres."],
    ],
    "sharegpt": [
        ["s Be brief.", "u Which tree?", "+a An oak.", "u Sure?", "+a Yes."],
        ["s Use tools.", "u How deep?", f"+a {CALL}", "t 42", "+a 42 metres."],
        ["u Which leaf?", "+a A beech's."],
    ],
    "alpaca": [
        ["u Name the tree.", "+a An oak."],
        [
            *["s Be brief.", "u Translate: the oak", "a die Eiche"],
            *["u Translate into German.\n\nthe beech", "+a die Buche"],
        ],
    ],
    "litellm": [["u Which bird?", "+a A heron."], ["u Which wing?", "+a The left one."]],
    "langsmith": [
        ["u Which fish?", "+a A carp."],
        ["s Be brief.", "u How deep?", f"+a {CALL}"],
        ["u Which fin?", "+a The tail."],
    ],
    "langfuse": [["u Which moss?", "+a Peat moss."], ["u Which fern?", "+a Bracken."], ["u Which herb?", "+a Thyme."]],
    "openwebui": [["s Be brief.", "u Which star?", "a Vega.", "u How far?", "+a I know it. 25 light years."]] * 2,
}
LEFT_OUT: dict[str, dict[Reason, int]] = {
    "alpaca": {Reason.NEUTRAL: 1},
    "litellm": {Reason.FAILED: 1, Reason.CUT_OFF: 1, Reason.NO_CHAT: 1, Reason.REDACTED: 2},
    "langsmith": {Reason.NEUTRAL: 2, Reason.SCORED: 1, Reason.UNRATED: 2, Reason.NO_CHAT: 1, Reason.FAILED: 1},
    "langfuse": {Reason.SCORED: 1, Reason.NO_CHAT: 1, Reason.FAILED: 1},
    "openwebui": {Reason.UNRATED: 2, Reason.FAILED: 1, Reason.CUT_OFF: 1},
}
KINDS = {
    "messages": {"demonstration": 3, "liked": 1, "disliked": 1},
    "openai-preference": {"correction": 1},
    "pairs": {"correction": 6},
    "trl": {"demonstration": 3, "liked": 1, "disliked": 1},
    "sharegpt": {"demonstration": 3, "disliked": 1},
    "alpaca": {"demonstration": 2},
    "litellm": {"demonstration": 2},
    "langsmith": {"demonstration": 2, "liked": 1, "disliked": 2},
    "langfuse": {"demonstration": 2, "liked": 1, "disliked": 3},
    "openwebui": {"liked": 2, "disliked": 2},
}
WITH_TOOLS = {
    "messages": [2], "openai-preference": [0], "trl": [3], "sharegpt": [1], "litellm": [0], "langsmith": [0],
    "langfuse": [0],
}  # fmt: skip


def test_every_format_has_a_file() -> None:
    names = [item.name for item in READ]
    assert sorted(FILES) == sorted(names) == sorted(EXPECTED) == sorted(KINDS)
    assert len({item.title for item in FORMATS}) == len(FORMATS) == len(by_name)


@pytest.mark.parametrize("name", FILES)
def test_what_becomes_of_every_record(name: str) -> None:
    """Without dislikes, and of pairs the chosen answers: all is a demonstration or liked."""
    data, left = FILES[name].read_bytes(), LEFT_OUT.get(name, {})
    source, found = read(data, dislikes=False, pairs="chosen")
    assert source.format is by_name[name]
    assert [short(item) for item in found] == EXPECTED[name]
    disliked = KINDS[name].get("disliked", 0)
    assert source.left_out == left | ({Reason.DISLIKED: disliked} if disliked else {}) and not source.strays
    with_tools = [i for i, item in enumerate(found) if isinstance(item, Transcript) and item.tools == [TOOL]]
    assert with_tools == WITH_TOOLS.get(name, [])
    assert read(data, name, dislikes=False, pairs="chosen")[1] == found, "named as it is found"
    source, found = read(data, dislikes=False, pairs="leave-out")
    pairs = KINDS[name].get("correction", 0)
    assert len(found) == len(EXPECTED[name]) - pairs and source.left_out[Reason.PAIR] == pairs


@pytest.mark.parametrize("name", FILES)
def test_what_was_said_makes_the_kind(name: str) -> None:
    """And an answer that must not be learnt is disliked or rejected, always."""
    source, found = read(FILES[name].read_bytes())
    assert source.left_out == LEFT_OUT.get(name, {})
    transcripts = [item for item in found if isinstance(item, Transcript)]
    assert Counter(item.kind for item in transcripts) == KINDS[name] and len(transcripts) == len(found)
    for item in transcripts:
        trained = [item.messages[turn]["content"] for turn in trained_turns(item.messages, item.train_on)]
        assert ("BAD" in " ".join(trained)) == (item.kind == "disliked")
        assert item.rejected is None or item.rejected["content"].startswith("BAD")


@pytest.mark.parametrize("name", FILES)
def test_ids_are_the_same_whenever_a_file_is_read(name: str) -> None:
    data = FILES[name].read_bytes()
    ids = [item.id for item in read(data)[1] if isinstance(item, Transcript)]
    assert ids == [item.id for item in read(data)[1] if isinstance(item, Transcript)]
    assert all(ids) and len(set(ids)) == len(ids) == sum(KINDS[name].values())


def test_ids_come_from_the_sources_where_those_are_unique() -> None:
    def ids(name: str) -> list[str | None]:
        return [item.id for item in read(FILES[name].read_bytes())[1] if isinstance(item, Transcript)]

    assert ids("litellm") == ["chatcmpl-1", "chatcmpl-7"]
    assert ids("langfuse")[:3] == ["lf-1", "lf-2", "lf-3"]
    assert ids("openwebui")[0] == "00000000-0000-4000-8000-000000000001"
    assert ids("messages")[0] == "own-1"
    assert str(ids("sharegpt")[0]).startswith("identity_0-"), "data sets number their records: the content decides too"
    asked = {"instruction": "q", "output": "a", "id": 7}
    same, other, bare, odd = (
        read(lines(value))[1][0]
        for value in (asked, asked | {"output": "b"}, asked | {"id": None}, asked | {"id": "ä/"})
    )
    assert all(isinstance(item, Transcript) for item in (same, other, bare, odd))
    assert len({item.id for item in (same, other, bare, odd)}) == 4  # type: ignore[union-attr]
    another = read(lines(asked | {"id": "ä/", "output": "b"}))[1][0]
    assert isinstance(another, Transcript) and another.id != odd.id  # type: ignore[union-attr]
    assert same.id.startswith("7-") and len(bare.id) == len(odd.id) == 32  # type: ignore[union-attr]
    assert read(lines({"output": "a", "source": "x", "instruction": "q"}))[1][0].id == bare.id  # type: ignore[union-attr]


def test_ratings_and_what_is_known_of_answers_travel_apart() -> None:
    """For losses of their own, later."""
    rows = json.loads(FILES["openwebui"].read_text())
    record = by_name["openwebui"].read(rows[0])
    assert (record.rating, record.comment, record.rejected) == (1.0, "good", None)
    disliked = by_name["openwebui"].read(rows[1])
    assert disliked.rating == -1.0 and disliked.fields["messages"][-1]["content"] == "BAD the moon."
    assert by_name["openwebui"].read(rows[5]).comment == "too long"
    pair = by_name["pairs"].read(json.loads(FILES["pairs"].read_text().splitlines()[0]))
    assert pair.rejected == [{"role": "assistant", "content": "BAD the Rhine."}]
    scored = by_name["langfuse"].read(json.loads(FILES["langfuse"].read_text().splitlines()[0]))
    assert (scored.rating, scored.comment) == (1.0, "nice")


@pytest.mark.parametrize(
    ("value", "halves", "rating"),
    [
        (True, False, 1), (False, False, -1), (1, False, 1), (-1, False, -1), (0, False, 0), ("1", False, 1),
        ("-1", False, -1), ("Thumbs_Up", False, 1), ("dislike", False, -1), (0.2, False, 0.2), (0.2, True, 0),
        (0.9, True, 0.8), (0, True, 0), (1, True, 1), (-1, True, -1), ({"rating": -1, "comment": "x"}, False, -1),
        ({"score": 0}, False, 0), ({"label": 0}, False, -1), ({"liked": False}, False, 0),
        ({"thumbs_down": False, "rating": 1}, False, 1), ({"thumbs_down": True, "rating": 1}, False, 0),
        ({"rating": 0.5, "thumbs": 1}, False, 0.5), ({"rating": -0.5, "thumbs": -1}, False, -0.5),
    ],
)  # fmt: skip
def test_what_a_rating_means(value: Any, halves: bool, rating: float) -> None:
    assert opinion(value, "x", halves=halves) == pytest.approx(rating)


@pytest.mark.parametrize("value", ["meh", "", None, [], {}, {"a": 1}, "nan", float("inf"), [1], {"rating": [1]}])
def test_what_is_no_rating_is_an_error(value: Any) -> None:
    with pytest.raises(InvalidTranscriptError, match="no like or dislike"):
        opinion(value, "x")


def test_a_scale_of_stars_is_refused() -> None:
    for value in (5, "4", -2, 1.5, {"rating": 10}):
        with pytest.raises(ScaleError, match="beyond -1 to 1"):
            opinion(value, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [("thumbs_down", True), ("user_rating", False), ("Dislike", 1), ("kto_tag", 0), ("label", "bad"), ("reward", -1)],
)
def test_a_dislike_beside_a_conversation_counts_in_every_format(name: str, value: Any) -> None:
    for record in ({"instruction": "q", "output": "BAD"}, {"prompt": "q", "completion": "BAD"}):
        _, (found,) = read(lines(record | {name: value}))
        assert isinstance(found, Transcript) and found.kind == "disliked"


@pytest.mark.parametrize("name", ["is_preferred", "liked", "reward", "rating"])
def test_what_says_neither_like_nor_dislike_is_left_out(name: str) -> None:
    source, found = read(lines({"instruction": "q", "output": "a", name: 0}))
    assert (found, source.left_out) == ([], {Reason.NEUTRAL: 1})


BAD_RECORDS: list[tuple[str, dict[str, Any], str]] = [
    ("sharegpt", {"conversations": [{"from": "parrot", "value": "x"}]}, "conversations[0].from: must be one of human"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0].value: must be a string, not null"),
    ("sharegpt", {"conversations": "x"}, "conversations: must be a list of turns"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "conversations[0].value: not valid"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "as a transcript, messages: no assistant turn"),
    ("alpaca", {"instruction": 1, "output": "x"}, "instruction: must be a string, not int"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]: must be a pair"),
    ("trl", {"prompt": 1, "completion": "x"}, "prompt: must be a text or a list of messages, not int"),
    ("trl", {"prompt": "x", "completion": "y", "label": "?"}, "label: is no like or dislike"),
    ("pairs", {"chosen": "x", "rejected": "y"}, "prompt: is missing"),
    ("pairs", {"prompt": "q", "chosen": "x", "rejected": "x"}, "rejected: is the very answer that was chosen"),
    ("openai-preference", {"input": {}, "preferred_output": [1], "non_preferred_output": [1]}, "input.messages: must"),
    ("litellm", {"messages": [], "response": {"choices": []}}, "messages: "),
    ("langsmith", {"inputs": {"x": 1}, "outputs": {}}, "inputs: holds no messages; known fields: messages"),
    ("langsmith", {"inputs": {"input": "q"}, "outputs": {"x": 1}}, "outputs: holds no answer; known fields: choices"),
    ("langfuse", {"input": "q", "output": None}, "output: must be an object, not null"),
    ("langfuse", {"input": "q", "output": {"choices": []}}, "output.choices: is empty"),
    ("openwebui", {"data": {"rating": 1}, "meta": {}}, "snapshot: is missing"),
    ("messages", {"messages": [{"role": "user", "content": "x"}], "wieght": 1}, "wieght: is no field of a transcript"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "says"), BAD_RECORDS)
def test_a_bad_record_is_named_by_its_field(name: str, value: dict[str, Any], says: str) -> None:
    assert recognise(value) is by_name[name]
    _, (found,) = read(lines(value))
    assert isinstance(found, InvalidTranscriptError) and str(found).startswith(says), found


def test_an_answer_that_is_json_itself_stays_a_text() -> None:
    for text in ('[{"name": "oak"}]', '{"a": 1}', "[1", '{"role": 1}'):
        _, (found,) = read(lines({"input": text, "output": text}))
        assert short(found) == [f"u {text}", f"+a {text}"]


def test_the_turns_before_a_question_are_not_lost() -> None:
    history = [{"type": "human", "content": "a"}, {"type": "ai", "content": "b"}]
    _, (found,) = read(lines({"inputs": {"question": "q", "chat_history": history}, "outputs": {"answer": "c"}}))
    assert short(found) == ["u a", "a b", "u q", "+a c"]


def test_an_answer_to_files_and_a_broken_history_of_open_webui() -> None:
    row = json.loads(FILES["openwebui"].read_text())[0]
    messages = row["snapshot"]["chat"]["chat"]["history"]["messages"]
    for change, says in [
        (("m4", "files", [{"type": "image"}]), "snapshot: message 1 before the rated one has files"),
        (("m1", "parentId", "m5"), "snapshot.chat.history.messages: has parents that lead in a circle"),
        (("m1", "parentId", "gone"), "snapshot.chat.history.messages: does not hold the rated message"),
        (("m5", "role", "user"), "meta.message_id: names no message by the assistant"),
    ]:
        before = dict(messages[change[0]])
        messages[change[0]][change[1]] = change[2]
        _, (found,) = read(lines(row))
        assert str(found).startswith(says)
        messages[change[0]] = before


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"prompt": "q", "chosen": "a"}, "preference pairs of TRL without rejected"),
        ({"prompt": "q"}, "prompts of TRL without completion"),
        ({"instruction": "q"}, "Alpaca's instructions without output"),
        ({"role": "user", "content": "x"}, "messages without the list messages around them"),
        ({"text": "x"}, "plain texts"),
        ({"data": [{"input": "q", "output": "a"}]}, "whose field 'data' holds traces of Langfuse"),
        ({"a": 1, "b": "secret"}, "JSON objects with the fields 'a', 'b'"),
        ({}, "JSON objects with the fields none"),
        (["secret"], "JSON values that are no objects (list)"),
    ],
)
def test_what_is_of_no_format_is_named_by_what_it_nearly_is(value: Any, says: str) -> None:
    assert recognise(value) is None
    assert says in near_miss(value) and "secret" not in near_miss(value)
