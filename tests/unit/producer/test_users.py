"""Whoever an export names is found again by `tandem forget`: in every format, who had asked and who said what."""

import json
from pathlib import Path
from typing import Any

import pytest
from import_parts import lines, read

from producer import users
from producer.errors import InvalidTranscriptError
from producer.formats import READ
from producer.transcript import Transcript

FOLDER = Path(__file__).parents[2] / "data" / "formats"
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def first(name: str) -> dict[str, Any]:
    """The first record of a format's file, without its users and meta."""
    text = next(FOLDER.glob(f"{name}.json*")).read_text()
    row: dict[str, Any] = json.loads(text)[0] if text.startswith("[") else json.loads(text.splitlines()[0])
    return row | ({"user_id": None} if name == "openwebui" else {"meta": {}})


def meta(row: dict[str, Any], *, format_name: str = "auto") -> dict[str, Any]:
    ((_, item),) = read(lines(row), format_name)[1]
    assert isinstance(item, Transcript), item
    return item.meta


def named(*found: str) -> dict[str, Any]:
    return {"user": found[0] if len(found) == 1 else list(found)}


SOURCE = {"type": "api", "user_id": "v", "metadata": {"user_id": "w"}}
WHERE: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("messages", {"user": "u"}, ("u",)),
    ("messages", {"user": "u", "safety_identifier": "s", "meta": {"user": "m"}}, ("m", "u", "s")),
    ("openai-preference", {"user_id": "u", "annotator": "v"}, ("u", "v")),
    ("pairs", {"user": 7, "rater_id": "v"}, ("7", "v")),
    ("trl", {"userId": "u", "label": True}, ("u",)),
    ("sharegpt", {"user": {"id": "u", "name": "Ada"}}, ("u",)),
    ("alpaca", {"user_id": "u", "reviewer": "u"}, ("u",)),
    ("litellm", {"end_user": "u", "metadata": {"user_api_key_user_id": "v"}}, ("u", "v")),
    ("litellm", {"metadata": json.dumps({"user_api_key_end_user_id": "u"})}, ("u",)),
    ("litellm", {"proxy_server_request": json.dumps({"user": "u"}), "model_parameters": {"user": "v"}}, ("v", "u")),
    ("langsmith", {"extra": {"metadata": {"user_id": "u"}}}, ("u",)),
    ("langsmith", {"feedback": [{"key": "thumbs", "score": 1, "feedback_source": SOURCE}]}, ("v", "w")),
    ("langsmith", {"feedback": {"thumbs": {"score": 1, "feedback_source": SOURCE}}}, ("v", "w")),
    ("langfuse", {"userId": "u", "scores": [{"name": "thumbs", "value": 1, "authorUserId": "v"}]}, ("u", "v")),
    ("langfuse", {"user_id": "u", "metadata": {"langfuse_user_id": "w"}}, ("u", "w")),
    ("openwebui", {"user_id": "u"}, ("u",)),
    ("openwebui", {"user_id": "u", "snapshot": first("openwebui")["snapshot"] | {"user_id": "v"}}, ("u", "v")),
]


@pytest.mark.parametrize(("name", "said", "found"), WHERE, ids=[f"{row[0]}-{n}" for n, row in enumerate(WHERE)])
def test_the_users_of_a_record_go_into_its_meta(name: str, said: dict[str, Any], found: tuple[str, ...]) -> None:
    assert meta(first(name) | said, format_name=name) == named(*found)
    assert users.of(named(*found)) == found


def test_every_format_is_tried_and_names_nobody_where_nobody_is_named() -> None:
    assert {name for name, *_ in WHERE} == {item.name for item in READ}
    for item in READ:
        assert meta(first(item.name), format_name=item.name) == {}


def test_what_two_users_say_alike_is_two_transcripts() -> None:
    """Each may be forgotten. A source whose ids are unique keeps them."""
    row = {"instruction": "q", "output": "a", "rating": 1}
    data = lines(row, row | {"user": "u"}, row | {"user": "v"}, row | {"user": "u"})
    ids = [item.id for _, item in read(data)[1] if isinstance(item, Transcript)]
    assert len(ids) == 4 and len(set(ids)) == 3 and ids[1] == ids[3]
    ((_, item),) = read(lines(first("openwebui") | {"user_id": "u"}))[1]
    assert isinstance(item, Transcript) and item.id == first("openwebui")["id"]


@pytest.mark.parametrize("odd", ["", "  ", None, True, 1.5, [], ["u"], {}, {"name": "u"}, 10**30])
def test_what_names_nobody_is_passed_over(odd: Any) -> None:
    assert meta({"instruction": "q", "output": "a", "user": odd}) == {}
    assert Transcript.from_dict({"messages": MESSAGES, "user": odd}).meta == {}


def test_a_name_that_is_too_long_is_an_error_that_does_not_quote_it() -> None:
    ((_, item),) = read(lines({"instruction": "q", "output": "a", "user_id": "u" * 1025}))[1]
    assert str(item) == "user_id: names a user with 1,025 characters, the limit is 1,024"
    assert users.of(meta({"instruction": "q", "output": "a", "user_id": "u" * 1024})) == ("u" * 1024,)


def test_a_logged_request_names_its_user() -> None:
    """Also where no file is read: `Producer.enqueue_many` takes such maps."""
    given = {"messages": MESSAGES, "user": "u"}
    assert Transcript.from_dict(given).meta == {"user": "u"}
    assert Transcript.from_dict(given | {"meta": {"user": "u", "a": 1}}).meta == {"user": "u", "a": 1}
    assert Transcript.from_dict(given | {"meta": {"user": {"mine": 1}}}).meta == {"user": [{"mine": 1}, "u"]}
    assert given == {"messages": MESSAGES, "user": "u"}
    for wrong in ([], "x"):
        with pytest.raises(InvalidTranscriptError, match="meta"):
            Transcript.from_dict(given | {"meta": wrong or [1]})
    with pytest.raises(InvalidTranscriptError, match="user_id: call it user"):
        Transcript.from_dict({"messages": MESSAGES, "user_id": "u"})


@pytest.mark.parametrize("odd", [None, [], "x", {"user": None}, {"user": [None, {}, [], 1.5]}, {"user": {"user": "u"}}])
def test_meta_that_names_nobody(odd: Any) -> None:
    assert users.of(odd) == ()
