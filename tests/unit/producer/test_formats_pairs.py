"""Corrections, in whatever form they come: what they become, and when they do not."""

from typing import Any

import pytest
from import_parts import lines, read

from producer.errors import InvalidTranscriptError
from producer.formats import Reason
from producer.transcript import Transcript

TALK = [{"role": "user", "content": "q"}]
GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "BAD"}


def only(row: dict[str, Any], **how: Any) -> Transcript | ValueError:
    _, ((_, found),) = read(lines(row), **how)
    return found


def test_a_pair_whose_answers_are_several_messages_is_no_correction() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    said = [call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "42."}]
    for better, worse in ((said, said[2:]), ([GOOD], said)):
        row = {"prompt": "q", "chosen": better, "rejected": worse}
        source, found = read(lines(row))
        assert (found, source.left_out) == ([], {Reason.LONG_PAIR: 1})
        assert only(row, pairs="chosen").kind == "demonstration"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "chosen": "a", "rejected": "BAD"},
        {"messages": TALK, "chosen": GOOD, "rejected": BAD, "weight": 0.5},
        {"messages": [*TALK, GOOD], "rejected": "BAD"},
    ],
)
def test_own_lines_with_a_correction_are_read_as_a_transcript_is(row: dict[str, Any]) -> None:
    assert only(row | {"id": "x"}) == Transcript.from_dict(row | {"id": "x"})
    chosen = only(row, pairs="chosen")
    assert isinstance(chosen, Transcript) and (chosen.kind, chosen.messages) == ("demonstration", [*TALK, GOOD])
    source, found = read(lines(row), pairs="leave-out")
    assert (found, source.left_out) == ([], {Reason.PAIR: 1})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*TALK, GOOD], "chosen": "a", "rejected": "BAD"},
        {"messages": TALK, "rejected": "BAD"},
        {"messages": TALK, "chosen": 3, "rejected": "BAD"},
        {"messages": TALK, "chosen": "a"},
        {"messages": [], "chosen": "a", "rejected": "BAD"},
        {"messages": TALK, "chosen": "a", "rejected": "a"},
        {"messages": TALK, "chosen": "a", "rejected": "BAD", "rating": 1},
    ],
)
def test_own_lines_that_are_no_correction_are_refused_as_a_transcript_is(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidTranscriptError) as caught:
        Transcript.from_dict(row)
    assert str(only(row)) == str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*TALK, BAD], "rejected": "BAD"},
        {"messages": [*TALK, BAD], "chosen": None, "rejected": "BAD "},
        {"messages": [*TALK, BAD], "rejected": [{"role": "assistant", "content": "\nBAD"}]},
        {"messages": [*TALK, BAD], "rejected": {"content": [{"type": "text", "text": "BAD"}]}},
        {"messages": [*TALK, BAD], "rejected": True},
        {"messages": [*TALK, BAD], "rejected": True, "train_on": [1]},
        {"messages": [*TALK, BAD], "rejected": []},
        {"messages": TALK, "chosen": "BAD", "rejected": " BAD"},
        {"messages": TALK, "chosen": "BAD", "rejected": True},
        {"input": {"messages": TALK}, "preferred_output": [BAD], "non_preferred_output": [BAD]},
        {"input": {"messages": TALK}, "preferred_output": [BAD, BAD], "non_preferred_output": [BAD, BAD]},
        {"prompt": "q", "chosen": [BAD], "rejected": [{"role": "assistant", "content": "BAD "}]},
        {"prompt": "q", "chosen": "a", "rejected": "BAD", "rating": -1},
    ],
)
def test_what_is_no_correction_is_an_error_however_pairs_are_used(row: dict[str, Any]) -> None:
    learn, chosen = only(row), only(row, pairs="chosen")
    assert isinstance(learn, InvalidTranscriptError) and str(chosen) == str(learn)
