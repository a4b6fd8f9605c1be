"""What clients, gateways and chat applications log (tests/data/client_logs): what becomes of it, or why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import reasoning
from producer.formats import ForeignFormatError, foreign
from producer.jsonl import NotTranscriptsError, read_transcripts
from producer.transcript import InvalidTranscript, Transcript

LOGS = Path(__file__).parents[2] / "data" / "client_logs"
USER = {"role": "user", "content": "x"}


def lines(name: str) -> dict[str, Any]:
    """The lines of a file by their ids."""
    return {line["id"]: line for line in map(json.loads, (LOGS / f"{name}.jsonl").read_text().splitlines())}


def answer(**fields: Any) -> dict[str, Any]:
    """The normalised answer of a transcript whose assistant logged `fields`."""
    transcript = Transcript.from_dict({"messages": [USER, {"role": "assistant", **fields}]})
    assert Transcript.from_dict(transcript.to_dict()) == transcript
    return transcript.messages[1]


def refusal(**fields: Any) -> InvalidTranscript:
    with pytest.raises(InvalidTranscript) as caught:
        Transcript.from_dict({"messages": [USER, {"role": "assistant", **fields}]})
    return caught.value


@pytest.mark.parametrize("id", ["c01-0", "c01-1", "c01-2", "c01-3"])
def test_a_tag_that_an_answer_mentions_is_text(id: str) -> None:
    """The empty reasoning keeps chat templates from looking for a think block in the answer."""
    line = lines("think_tag_in_answer")[id]
    got = Transcript.from_dict(line).messages[1]
    assert (got["content"], got["reasoning_content"]) == (line["messages"][1]["content"], "")


@pytest.mark.parametrize(
    ("content", "thought", "rest"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("\n<think>\n\n</think>\n\nYes.", None, "Yes."),
        ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("</think>\nYes.", None, "Yes."),
        ("<think>\na </think> b\n</think>\nYes.", "a", "b\n</think>\nYes."),
        ("<think>\n</think><think>b</think>c", "b", "c"),
        ("<think> and </think> are tags.", "", "<think> and </think> are tags."),
        ("```\n</think>\n```", "", "```\n</think>\n```"),
        ("Open with\n<think>\nand close with\n</think>\n", "", "Open with\n<think>\nand close with\n</think>\n"),
        ("a </think>\nb", "", "a </think>\nb"),
    ],
)
def test_a_think_block_is_found_where_servers_put_it_and_nowhere_else(
    content: str, thought: str | None, rest: str
) -> None:
    got = answer(content=content)
    assert (got.get("reasoning_content"), got["content"]) == (thought, rest)


def test_reasoning_in_its_own_field_leaves_the_content_alone() -> None:
    got = answer(content="<think>x</think>y", reasoning="why")
    assert (got["reasoning_content"], got["content"]) == ("why", "<think>x</think>y")


@pytest.mark.parametrize(
    "content", ["<think>\nI was cut", "<think>", '<details type="reasoning" done="false">\n> I was']
)
def test_reasoning_that_was_cut_off_is_not_learnt_as_an_answer(content: str) -> None:
    error = refusal(content=content)
    assert error.field == "messages[1].content" and "never closes it" in error.problem and "weight 0" in error.problem
    both = [USER, {"role": "assistant", "content": content}, USER, {"role": "assistant", "content": "y"}]
    assert Transcript.from_dict({"messages": both, "train_on": "last"}).messages[1]["content"] == content, "context"
    both[1] = {**both[1], "weight": 0}
    assert Transcript.from_dict({"messages": both}).train_on == [3]


def test_open_webuis_markup() -> None:
    logged = lines("openwebui_markup")
    got = Transcript.from_dict(logged["c09-0"]).messages[1]
    assert got == {"role": "assistant", "content": "4.", "reasoning_content": "add them"}
    with pytest.raises(InvalidTranscript) as caught:
        Transcript.from_dict(logged["c09-1"])
    assert caught.value.field == "messages[1].content"
    assert all(word in caught.value.problem for word in ("tool call", "tool_calls", "message by tool", "weight 0"))
    reasoned = (
        '<details type="reasoning" done="true">\n<summary>x</summary>\n&gt; 1 &lt; 2\n&gt;\n&gt; so\n</details>\n'
    )
    got = answer(content=f'{reasoned}<details type="reasoning" done="true">> more</details>\nYes.')
    assert (got["reasoning_content"], got["content"]) == ("1 < 2\n\nso\n\nmore", "Yes.")
    assert "in the middle" in refusal(content=f"First. {reasoned} Second.").problem
    for said in ("<details><summary>More</summary>text</details>", f"```html\n{reasoned}```", f"`{reasoned[:26]}`"):
        assert answer(content=said)["content"] == said


def test_a_message_of_weight_0_is_context() -> None:
    logged = lines("weight_per_message")
    assert Transcript.from_dict(logged["c08-0"]).to_dict()["train_on"] == [3]
    assert "train_on" not in Transcript.from_dict(logged["c08-1"]).to_dict()
    zero, one = (
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "y", "weight": 1.0},
    )
    greeting = [{"role": "assistant", "content": "Hello"}, USER, zero, USER, one]
    assert Transcript(messages=greeting).train_on == [4], "nor is a greeting trained"
    for messages, train_on, field, says in [
        ([USER, zero], "all", "messages", "every assistant turn has weight 0"),
        ([USER, one, USER, zero], "last", "train_on", r"messages\[3\], has weight 0"),
        ([USER, zero, USER, one], [1, 3], "train_on[0]", "take it out here"),
        ([USER, {**one, "weight": 0.5}], "all", "messages[1].weight", "must be 0 or 1; the weight beside messages"),
        ([USER, {**one, "weight": True}], "all", "messages[1].weight", "must be 0 or 1"),
        ([USER, {**one, "weight": "0"}], "all", "messages[1].weight", "must be 0 or 1"),
        ([{**USER, "weight": 1}, one], "all", "messages[0].weight", "only messages by assistant are trained"),
    ]:
        with pytest.raises(InvalidTranscript, match=says) as caught:
            Transcript(messages=messages, train_on=train_on)
        assert caught.value.field == field
    assert Transcript(messages=[{**USER, "weight": 0}, one]).train_on == "all"


@pytest.mark.parametrize("id", ["c27-0", "c27-1", "c27-2", "c27-3", "c27-4", "c27-5"])
def test_what_gateways_log_beside_an_answer(id: str) -> None:
    got = Transcript.from_dict(lines("gateway_fields")[id]).messages[1]
    thought = {} if id in ("c27-1", "c27-5") else {"reasoning_content": "r"}
    assert got == {"role": "assistant", "content": "4.", **thought}


def test_reasoning_that_only_gateways_log_is_not_lost() -> None:
    blocks = [{"type": "thinking", "thinking": "a", "signature": "s"}, {"type": "redacted_thinking", "data": "?"}]
    assert answer(content="y", thinking_blocks=blocks)["reasoning_content"] == "a"
    details = [{"type": "reasoning.text", "text": "a"}, {"type": "reasoning.text", "text": "b"}]
    assert answer(content="y", reasoning_details=details)["reasoning_content"] == "ab"
    summary = [{"type": "reasoning.summary", "summary": "s"}, {"type": "reasoning.encrypted", "data": "?"}]
    assert answer(content="y", reasoning_details=summary, reasoning="a")["reasoning_content"] == "a"
    error = refusal(content="y", reasoning_details=summary)
    assert error.field == "messages[1].reasoning_details" and "put the text into reasoning" in error.problem
    error = refusal(content="y", reasoning="a", thinking="b")
    assert error.field == "messages[1].reasoning" and "differs from thinking" in error.problem
    assert refusal(content="y", thinking_blocks="x").field == "messages[1].thinking_blocks"
    assert refusal(content="y", thinking_blocks=[{"thinking": 1}]).field == "messages[1].thinking_blocks[0].thinking"


def test_what_openais_clients_log() -> None:
    logged = lines("openai_fields")
    for id in ("c28-0", "c28-3"):
        assert Transcript.from_dict(logged[id]).messages == [USER, {"role": "assistant", "content": "y"}]
    called, result = Transcript.from_dict(logged["c28-1"]).messages[1:3]
    assert called["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    assert result == {"role": "tool", "name": "add", "content": "4"}
    with pytest.raises(InvalidTranscript) as caught:
        Transcript.from_dict(logged["c28-2"])
    assert caught.value.field == "messages[1].refusal" and "send the text as content" in caught.value.problem
    assert [m.get("name") for m in Transcript.from_dict(logged["c28-4"]).messages] == ["Ann", "bot"]
    error = refusal(content=None, function_call={"name": "f"}, tool_calls=[{"function": {"name": "f"}}])
    assert error.field == "messages[1].function_call"
    assert refusal(content="y", function_call="f").field == "messages[1].function_call"


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"enable_thinking": False}, "enable_thinking", "chat_template_kwargs"),
        ({"metadata": {"a": 1}}, "metadata", "call it meta"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"system": "Be kind."}, "system", "role system"),
        ({"wieght": 1}, "wieght", "put it into meta"),
        ({"a b": 1}, "['a b']", "put it into meta"),
    ],
)
def test_a_refusal_names_the_field_and_the_right_thing_to_do(fields: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidTranscript, match=says) as caught:
        Transcript.from_dict({"messages": [USER, {"role": "assistant", "content": "y"}], **fields})
    assert caught.value.field == field


def test_the_same_of_messages() -> None:
    for fields, field, says in [
        ({"audio": {"id": "a"}}, "messages[1].audio", "send what was said as content"),
        ({"content": [{"type": "thinking", "thinking": "r"}]}, "messages[1].content[0].type", "the field reasoning"),
        ({"content": [{"type": "output_text", "text": "r"}]}, "messages[1].content[0].type", 'must be "text"'),
        ({"moode": "x"}, "messages[1].moode", "remove it. Known of a message by assistant"),
    ]:
        error = refusal(**({"content": "y"} | fields))
        assert error.field == field and says in error.problem


# Files of other formats, where transcripts are asked for


FOREIGN = {
    "preference_formats": ["pairs of OpenAI's", "pairs of TRL", "prompts with completions", "prompts with completions",
                           "(messages with 'label')"],
    "other_transcript_shapes": ["ShareGPT", "Alpaca", "Langfuse", "LangSmith", "LiteLLM", "LibreChat", "Responses"],
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_line_of_another_format_is_named(name: str) -> None:
    """And what to do is said: never to keep the rating of a bad answer where nobody reads it."""
    read = (LOGS / f"{name}.jsonl").read_text().splitlines()
    *others, rated = read if name == "preference_formats" else [*read, None]
    assert rated is None or Transcript.from_dict(json.loads(rated)).kind == "disliked"
    for line, says in zip(others, FOREIGN[name], strict=True):
        with pytest.raises(ForeignFormatError) as caught:
            Transcript.from_dict(json.loads(line))
        assert (
            says in caught.value.problem and "messages" in caught.value.problem and "meta" not in caught.value.problem
        )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_format_is_refused_once(name: str, tmp_path: Path) -> None:
    """By its first line, also after blank ones; further on, a line of another format is one that is wrong."""
    text = (LOGS / f"{name}.jsonl").read_text()
    (tmp_path / "f").write_text("\n \n" + text)
    with pytest.raises(NotTranscriptsError) as caught:
        list(read_transcripts(str(tmp_path / "f")))
    assert str(tmp_path / "f") in str(caught.value) and FOREIGN[name][0] in str(caught.value)
    (tmp_path / "f").write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "y"}]}) + "\n" + text)
    first, *others = [item for _, item in read_transcripts(str(tmp_path / "f"))]
    foreigners = [item for item in others if isinstance(item, ForeignFormatError)]
    assert isinstance(first, Transcript) and len(foreigners) == len(FOREIGN[name]) >= len(others) - 1


@pytest.mark.parametrize("shape", ["indented", "one_line"])
def test_an_array_is_refused_by_what_is_in_it(shape: str) -> None:
    path = str(LOGS / f"feedback_export_as_json_{shape}.json")
    with pytest.raises(NotTranscriptsError, match="these are feedback exports of Open WebUI"):
        list(read_transcripts(path))


@pytest.mark.parametrize("indent", [None, 2])
def test_transcripts_in_an_array_or_over_several_lines(tmp_path: Path, indent: int | None) -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "y" * 10_000}]}
    (tmp_path / "f").write_text(json.dumps([good, good], indent=indent), encoding="utf-8")
    assert [item for _, item in read_transcripts(str(tmp_path / "f"))] == [Transcript.from_dict(good)] * 2
    (tmp_path / "f").write_text(json.dumps(good, indent=2), encoding="utf-8")
    assert list(read_transcripts(str(tmp_path / "f"))) == [(1, Transcript.from_dict(good))]


def test_formats_are_known_by_what_no_transcript_has() -> None:
    good = {"messages": [USER, {"role": "assistant", "content": "y"}], "tools": [], "meta": {"rating": 1}, "weight": 1}
    assert foreign(good) is None and foreign({}) is None and foreign(good | {"rating": 1, "rejected": "x"}) is None


TAGS = ["<think>", "</think>", "\n", " ", "é", "```", "`", '<details type="reasoning" done="true">', "</details>", "> "]
TAGS += ["<summary>s</summary>", '<details type="tool_calls" done="true">', "&gt;"]
MARKUP = st.lists(st.sampled_from(TAGS), max_size=9).map("".join)


@given(content=MARKUP, fields=st.dictionaries(st.sampled_from(reasoning.FIELDS[:3]), MARKUP, max_size=2))
def test_reasoning_once_found_is_not_looked_for_again(content: str, fields: dict[str, str]) -> None:
    """And nothing that was said is lost: every letter is in the reasoning or in the answer."""
    try:
        thought, rest = reasoning.take(dict(fields), content, "m")
    except InvalidTranscript as error:
        assert "differs" in error.problem
        return
    assert rest in content and reasoning.take({"reasoning_content": thought}, rest, "m") == (thought, rest)
    if any(text.strip() for text in fields.values()):
        assert rest == content
    else:
        assert content.count("é") == thought.count("é") + rest.count("é")
    messages = [USER, {"role": "assistant", "content": content, **fields}, USER, {"role": "assistant", "content": "y"}]
    transcript = Transcript(messages=messages, train_on="last")
    assert Transcript.from_dict(transcript.to_dict()) == transcript
    assert ("</think>" in transcript.messages[1]["content"]) <= ("reasoning_content" in transcript.messages[1])


@pytest.mark.timeout(60)
def test_many_tags_that_never_end_are_text() -> None:
    """In no time; where the rest is looked through from each tag, in hours."""
    tags = '<details type="reasoning" ' * 150_000
    assert reasoning.unfit(tags) is None and reasoning.take({}, tags, "x") == ("", tags)
    assert reasoning.unfit("x" + tags) is None
    assert "in the middle of an answer" in str(reasoning.unfit("x" + tags + ">"))
    assert "never closes it" in str(reasoning.unfit(tags + ">"))
