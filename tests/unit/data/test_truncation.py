"""Conversations that are too long, or too expensive: the latest turns are trained, and it is said how many."""

import json
from typing import Any

import pytest
from examples_parts import DATA, QUESTIONS, TEMPLATES, TOKENIZER, build, builder, runs, trained
from test_examples import TRIP

from producer.transcript import Transcript
from worker.data import examples
from worker.data.examples import ExampleError


@pytest.mark.parametrize("limit", [70, 90, 120, 200])
def test_over_long_keeps_the_system_message_and_the_latest_turns(limit: int) -> None:
    example = builder(max_tokens=limit).build(Transcript(messages=QUESTIONS), "t")
    dropped = example.report["dropped_messages"]
    assert dropped > 0 and dropped % 2 == 0 and example.report["dropped_turns"] == dropped // 2
    kept = [QUESTIONS[0], *QUESTIONS[1 + dropped :]]
    again = builder().build(Transcript(messages=kept), "t")
    assert example.sequences == again.sequences
    for context, _ in runs(example):
        assert TOKENIZER.decode(context).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert max(len(sequence.ids) for sequence in example.sequences) <= limit
    one_more = [QUESTIONS[0], *QUESTIONS[dropped - 1 :]]
    with pytest.raises(ExampleError, match="the limit is"):
        builder(max_tokens=limit, overlong="reject").build(Transcript(messages=one_more), "t")


def test_nothing_after_the_last_trained_turn_counts() -> None:
    example = builder(max_tokens=60).build(Transcript(messages=QUESTIONS, train_on=[2]), "t")
    assert trained(example) == ["Answer 0: the capital of France is Paris.<|im_end|>"]
    assert example.report["dropped_messages"] == 0


def test_a_single_turn_too_long() -> None:
    with pytest.raises(ExampleError, match=r"messages\[12\] with its context has \d+ tokens, the limit is 40: shorten"):
        builder(max_tokens=40).build(Transcript(messages=QUESTIONS), "t")
    loop = TRIP[:6]  # one user turn only: there is nothing to drop
    with pytest.raises(ExampleError, match=r"messages\[5\]"):
        builder(max_tokens=80).build(Transcript(messages=loop), "t")


def test_expansion_is_bounded_by_training_the_latest_turns() -> None:
    example = build(QUESTIONS)
    total = sum(len(sequence.ids) for sequence in example.sequences)
    longest = max(len(sequence.ids) for sequence in example.sequences)
    assert example.report["expansion"] == pytest.approx(total / longest, abs=1e-3) and total / longest > 3
    fewer = builder(max_expansion=3).build(Transcript(messages=QUESTIONS), "t")
    assert fewer.sequences == example.sequences[-fewer.report["turns"] :]
    assert fewer.report["turns"] == 3 and fewer.report["dropped_turns"] == 3 and fewer.report["dropped_messages"] == 0
    assert fewer.report["expansion"] <= 3
    assert builder(max_expansion=1).build(Transcript(messages=QUESTIONS), "t").report["turns"] == 1
    with pytest.raises(ExampleError, match="max_expansion must be at least 1, not 0"):
        builder(max_expansion=0)


def test_a_chat_of_33_turns_is_trained_and_says_how_many() -> None:
    """Each turn is a sequence of its own: with this tokenizer the latest 26 cost 16 times the conversation."""
    line = json.loads((DATA / "client_logs" / "chat_of_33_turns.jsonl").read_text())
    example = build(line["messages"])
    assert example.report["turns"] + example.report["dropped_turns"] == 33
    assert trained(example) == [f"It is {2 * n}.<|im_end|>" for n in range(33)][-example.report["turns"] :]
    assert 15 < example.report["expansion"] <= 16 and example.report["turns"] == 26


def test_what_is_rendered_is_bounded_by_training_the_latest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a template that keeps history, where the expansion is 1 and the work grows with the turns' square."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert build(QUESTIONS, template).report == build(QUESTIONS, template).report | {"turns": 6, "dropped_turns": 0}
    whole = sum(examples.MESSAGE + len("role" + "content" + m["role"] + m["content"]) for m in QUESTIONS)
    monkeypatch.setattr(examples, "RENDERED", whole + 1)
    example = build(QUESTIONS, template)
    assert example.report["turns"] == 2 and example.report["dropped_turns"] == 4
    assert trained(example) == [QUESTIONS[i]["content"] + "<|im_end|>" for i in (10, 12)]
    tool = {"type": "function", "function": {"name": "f", "description": "x" * whole}}
    assert build(QUESTIONS, template, tools=[tool]).report["turns"] == 1, "tools are rendered with every turn"


def test_looking_for_a_start_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier turns are longer than the last one: without a bound every user's turn is tried as a start."""
    chat = []
    for _ in range(40):
        chat += [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning": "Hm. " * 40}]
    chat += [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    limit = len(build(chat[-2:]).sequences[0].ids) + 60
    starts: list[int] = []
    latest = examples._Work.latest

    def counted(work: Any, asked: list[int], start: int) -> Any:
        starts.append(start)
        return latest(work, asked, start)

    monkeypatch.setattr(examples._Work, "latest", counted)
    report = builder(max_tokens=limit).build(Transcript(messages=chat), "t").report
    assert (report["turns"], report["dropped_turns"]) == (1, 40) and len(starts) > 5
    starts.clear()
    monkeypatch.setattr(examples, "RENDERED", 1000)
    report = builder(max_tokens=limit).build(Transcript(messages=chat), "t").report
    assert (report["turns"], report["dropped_turns"]) == (1, 40) and len(starts) == 2


def test_a_template_that_refuses_every_start_is_asked_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if messages | length < 14 %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["qwen3_5_think"]
    longer = [*QUESTIONS, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(ExampleError, match=r"the limit is 40: shorten it, or raise the limit$"):
        builder(template, max_tokens=40).build(Transcript(messages=longer, train_on="last"), "t")
    monkeypatch.setattr(examples, "RENDERED", 1000)
    with pytest.raises(ExampleError, match=r"the limit is 40: .*a later start took too long: .*train_on: .last"):
        builder(template, max_tokens=40).build(Transcript(messages=longer, train_on="last"), "t")


def test_truncation_does_not_start_where_the_template_refuses_to() -> None:
    """Qwen takes a user message in <tool_response> for a tool's answer, and wants a question before it."""
    answer = {"role": "assistant", "content": "Hm. " * 12}
    dressed = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    chat = [{"role": "user", "content": "Q"}, answer, dressed, answer, {"role": "user", "content": "R"}, answer]
    sizes = [builder().build(Transcript(messages=chat[start:], train_on="last"), "t").tokens for start in (0, 4)]
    example = builder(max_tokens=sizes[0] - 1).build(Transcript(messages=chat), "t")
    assert example.report["dropped_messages"] == 4 and example.tokens == sizes[1]


def test_truncation_and_the_bound_both_hold() -> None:
    example = builder(max_tokens=150, max_expansion=1.5).build(Transcript(messages=QUESTIONS), "t")
    assert example.report["dropped_messages"] > 0 and example.report["expansion"] <= 1.5
    assert example.report["turns"] + example.report["dropped_turns"] == 6
    assert trained(example) == [QUESTIONS[12]["content"] + "<|im_end|>"]
