"""A file as the cases of an evaluation: what is scored, its digest, and what is refused by line."""

import json
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pytest
from examples_parts import builder
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.errors import TandemError
from worker.operations.evaluation.cases import CaseSet, read_cases, same_answer

BUILDER = builder()
FORMATS = Path(__file__).parents[2] / "data" / "formats"


def talk(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | more


class Named(BytesIO):
    name = "set.jsonl"


def read(*records: Any) -> CaseSet:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    return read_cases(BufferedReader(Named("\n".join(lines).encode())), BUILDER)  # type: ignore[arg-type]


def test_a_case_is_what_training_counts_and_the_prompt_of_its_last_answer() -> None:
    messages = [*talk("One?", "1")["messages"], *talk("Two?", "2")["messages"]]
    (case,) = read({"id": "c", "messages": messages}).cases
    decode = BUILDER._renderer.tokenizer.decode
    assert (case.line, case.id, case.question) == (1, "c", "Two?")
    assert decode(case.reference) == "2<|im_end|>"
    assert decode(case.context).endswith("<think>\n\n</think>\n\n") and "One?" in decode(case.context)
    scored = [i for one in case.asked for i, counts in zip(one.ids, one.mask, strict=True) if counts]
    assert decode(scored) == "1<|im_end|>2<|im_end|>" and case.tokens == len(scored)


def test_a_pair_has_both_sides_and_what_was_disliked_is_counted() -> None:
    pair = {"messages": [{"role": "user", "content": "When?"}], "chosen": "At six.", "rejected": "No idea."}
    found = read(pair, talk("a", "b", rating=-1), talk("a", "b", comment="shorter"), talk("a", "b", rating=1))
    first, liked = found.cases
    decode = BUILDER._renderer.tokenizer.decode
    assert "No idea." in decode(first.rejected[0].ids) and "At six." in decode(first.asked[0].ids)
    assert not any(one.rejected for one in (*first.asked, *first.rejected)), "both are scored alike"
    assert liked.rejected == () and found.left_out == {"disliked": 1, "comment": 1}


def test_every_format_of_enqueue_is_read_or_says_that_nothing_is_to_give() -> None:
    seen = 0
    for path in sorted(FORMATS.glob("*.json*")):
        with path.open("rb") as file:
            try:
                seen += len(read_cases(file, BUILDER).cases)
            except TandemError as error:
                assert str(path) in str(error), error
    assert seen > 20


def test_all_bad_lines_are_named_at_once_and_nothing_is_quoted() -> None:
    secret = {"messages": [{"role": "assistant", "content": "a secret of mine"}]}
    with pytest.raises(TandemError, match="nothing was evaluated, 2 lines cannot be scored") as caught:
        read(talk("a", "b"), "{", secret)
    assert "set.jsonl:2: not valid JSON" in str(caught.value) and "set.jsonl:3: " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_without_answers_to_give_is_refused() -> None:
    with pytest.raises(TandemError, match=r"set\.jsonl holds no answer to give"):
        read(talk("a", "b", rating=-1))


words = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map(" ".join)
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=25)
@given(talks, talks)
def test_digests_are_equal_where_the_conversations_are(one: Any, other: Any) -> None:
    """Ids, meta and weights do not count: they change nothing that is scored. The order does."""
    first = read(*(talk(*pair) for pair in one)).digest
    second = read(*(talk(*pair, id=f"i-{i}", weight=0.5, meta={"x": 1}) for i, pair in enumerate(other))).digest
    assert (first == second) == (one == other)


def test_both_sides_of_a_pair_are_in_the_digest() -> None:
    ask = [{"role": "user", "content": "When?"}]
    sides = [("six", "ten"), ("ten", "six"), ("six", "two")]
    assert len({read({"messages": ask, "chosen": a, "rejected": b}).digest for a, b in sides}) == 3


def test_answers_are_the_same_by_their_text() -> None:
    text = {(1, 2): "at six", (3,): " at six\n", (4,): "at seven"}

    def decode(tokens: Any) -> str:
        return text[tuple(tokens)]

    assert same_answer(decode, (1, 2), (1, 2)) and same_answer(decode, (3,), (1, 2))
    assert not same_answer(decode, (4,), (1, 2))
