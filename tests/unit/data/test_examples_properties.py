"""Whatever the conversation: trained is what the assistant said, given is what the server would have been sent."""

import unicodedata
from typing import Any

from examples_parts import END, QUESTIONS, TEMPLATES, TOKENIZER, builder, prompt, runs, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.transcript import Transcript
from worker.data.examples import Example, ExampleError

PIECES = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<tool_call>", "</tool_response>", "<|im", "_end|>",
    "<think>", " the", "\n", "\n\n", " ", "é", "e\u0301", "日本", "\u200b", "0", "{{ x }}", "user\n",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=6).map("".join)
SPOKEN = TEXT.filter(lambda text: text.strip() and "</think>" not in text and not text.lstrip().startswith("<think>"))


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": "?" + draw(TEXT)})
        for _ in range(draw(st.integers(1, 2))):
            message = {"role": "assistant", "content": draw(SPOKEN)}
            if draw(st.booleans()):
                message["reasoning_content"] = draw(SPOKEN)
            messages.append(message)
            if draw(st.booleans()):
                messages.append({"role": "tool", "content": draw(TEXT)})
    return messages


def said(message: dict[str, Any]) -> str:
    """What the Qwen templates make of a turn, after a prompt that opens the think block or holds an empty one."""
    reasoning = message.get("reasoning_content", "").strip()
    text = (reasoning + "\n</think>\n\n" if reasoning else "") + message["content"].strip()
    return unicodedata.normalize("NFC", text) + "<|im_end|>"


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), name=st.sampled_from(sorted(TEMPLATES)), data=st.data())
def test_any_conversation(messages: list[dict[str, Any]], name: str, data: Any) -> None:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = data.draw(st.lists(st.sampled_from(turns), min_size=1, unique=True).map(sorted))
    transcript = Transcript(messages=messages, train_on=chosen)
    example = builder(TEMPLATES[name]).build(transcript, "t")
    assert trained(example) == [said(messages[i]) for i in chosen]
    for (context, ids), index in zip(runs(example), chosen, strict=True):
        thinking = bool(messages[index].get("reasoning_content", "").strip())
        assert context == prompt(messages[:index], TEMPLATES[name], enable_thinking=thinking)
        assert ids.count(END) == 1
    assert example.report["trained_tokens"] == sum(len(ids) for _, ids in runs(example))


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), limit=st.integers(8, 200))
def test_any_limit(messages: list[dict[str, Any]], limit: int) -> None:
    """Either a truncated conversation that is built as if it were the whole, or an error; never a longer sequence."""
    transcript = Transcript(messages=messages)
    system = [m for m in messages[:1] if m["role"] == "system"]
    try:
        example = builder(max_tokens=limit).build(transcript, "t")
    except ExampleError as error:
        assert f"the limit is {limit}" in str(error)
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        shortest = builder().build(Transcript(messages=system + messages[users[-1] :]), "t")
        assert max(len(sequence.ids) for sequence in shortest.sequences) > limit
        return
    assert all(len(sequence.ids) <= limit for sequence in example.sequences)
    start = len(system) + example.report["dropped_messages"]
    whole = builder().build(Transcript(messages=system + messages[start:]), "t")
    assert example.sequences == whole.sequences
    if example.report["dropped_messages"]:
        assert messages[start]["role"] == "user"


@settings(max_examples=30, deadline=None)
@given(bound=st.floats(1, 4), data=st.data())
def test_any_bound_on_the_expansion(bound: float, data: Any) -> None:
    """Trained are the latest turns within the bound, and no fewer than fit."""
    turns = sorted(data.draw(st.lists(st.sampled_from(range(2, 14, 2)), min_size=1, unique=True)))
    example = builder(max_expansion=bound).build(Transcript(messages=QUESTIONS, train_on=turns), "t")
    kept = example.report["turns"]
    assert kept >= 1 and kept + example.report["dropped_turns"] == len(turns)

    def free(count: int) -> Example:
        return builder(max_expansion=100).build(Transcript(messages=QUESTIONS, train_on=turns[-count:]), "t")

    assert example.sequences == free(kept).sequences
    assert free(kept).report["expansion"] <= bound + 1e-3
    if kept < len(turns):
        assert free(kept + 1).report["expansion"] > bound - 1e-3
    assert TOKENIZER.eos_token_id == END
