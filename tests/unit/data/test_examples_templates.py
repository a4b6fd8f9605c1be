"""Chat templates of other shapes: generation tags, other ends of a turn, and those that must be refused."""

from typing import Any

import pytest
from examples_parts import END, QUESTIONS, TOKENIZER, build, builder, prompt, runs, trained

from producer.transcript import Transcript
from worker.data.examples import ExampleError

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Bye."},
]


def chatml(assistant: str, prompt: str = "<|im_start|>assistant\n", other: str = "{{ m.content }}<|im_end|>\n") -> str:
    """A ChatML template whose assistant turns are rendered by `assistant`, header included."""
    return (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        + assistant
        + "{%- else -%}{{ '<|im_start|>' + m.role + '\\n' }}"
        + other
        + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '"
        + prompt.replace("\n", "\\n")
        + "' }}{%- endif -%}"
    )


PLAIN = chatml("{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}")


def test_histories_that_are_kept_share_one_sequence() -> None:
    example = build(QUESTIONS, PLAIN)
    assert len(example.sequences) == 1 and example.report["expansion"] == 1.0
    assert len(trained(example)) == example.report["turns"] == 6
    for (context, _), index in zip(runs(example), range(2, 14, 2), strict=True):
        assert context == prompt(QUESTIONS[:index], PLAIN)


def test_a_history_that_differs_in_one_token_gets_a_sequence_of_its_own() -> None:
    """Its length, and the answers in it, are as before: only the token in front is another."""
    counted = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}" + PLAIN
    example = build(CHAT, counted)
    assert len(example.sequences) == 2
    assert trained(example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    for (context, _), index in zip(runs(example), (1, 3), strict=True):
        assert context == prompt(CHAT[:index], counted)


def test_a_gap_in_the_trained_turns_is_context() -> None:
    example = build(QUESTIONS, PLAIN, train_on=[2, 8])
    assert len(example.sequences) == 1
    assert trained(example) == [QUESTIONS[i]["content"] + "<|im_end|>" for i in (2, 8)]


@pytest.mark.parametrize(
    "assistant",
    [
        "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
        # Tags that leave the end of the turn out: it is trained all the same, or the model would never stop.
        "{{ '<|im_start|>assistant\\n' }}{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ '<|im_end|>\\n' }}",
        # Tags that open before the server's prompt ends: what the prompt holds is not trained.
        "{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}",
    ],
)
def test_generation_tags(assistant: str) -> None:
    example = build(CHAT, chatml(assistant))
    assert trained(example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    assert len(example.sequences) == 1
    plain = build(CHAT, PLAIN)
    assert example.sequences == plain.sequences


def test_generation_tags_leave_out_what_the_template_writes() -> None:
    """The tags say that "Answer: " is not the model's to learn, though a server would have it generated."""
    tagged = (
        "{{ '<|im_start|>assistant\\nAnswer:' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n"
    )
    example = build(CHAT, chatml(tagged))
    assert trained(example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    for (context, _), index in zip(runs(example), (1, 3), strict=True):
        assert context == prompt(CHAT[:index], chatml(tagged)) + TOKENIZER.encode("Answer:")


def test_generation_tags_around_nothing_are_refused() -> None:
    tagged = "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% generation %}{% endgeneration %}"
    with pytest.raises(ExampleError, match=r"messages\[1\] has nothing between the chat template's generation tags"):
        build(CHAT[:2], chatml(tagged))


def test_a_second_end_after_the_end_of_the_turn() -> None:
    """Templates that close a finished conversation with the end of text: a server stops at the first end."""
    template = PLAIN + "{%- if not add_generation_prompt -%}<|endoftext|>{%- endif -%}"
    example = build(CHAT, template)
    assert trained(example) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    assert len(example.sequences) == 1


def test_a_turn_that_closes_with_another_control_token_before_its_end() -> None:
    close = "{% if m.tool_calls %}<|box_end|><|quad_end|>{% endif %}<|im_end|>\n"
    assistant = "{{ '<|im_start|>assistant\\n' + m.content }}" + close
    chat: list[dict[str, Any]] = [dict(message) for message in CHAT]
    chat[1]["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    assert trained(build(chat, chatml(assistant))) == ["Hello.<|box_end|><|quad_end|><|im_end|>", "Bye.<|im_end|>"]


def test_a_turn_that_ends_otherwise() -> None:
    """A turn that calls a tool may end with a token of its own: the last one, unless an end is known before it."""
    close = "{{ '<|box_end|><|quad_end|>' if m.tool_calls else '<|im_end|>' }}\n"
    template = chatml("{{ '<|im_start|>assistant\\n' + m.content }}" + close)
    chat = [CHAT[0], CHAT[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, *CHAT[2:]]
    assert trained(build(chat, template)) == ["Hello.<|box_end|><|quad_end|>", "Bye.<|im_end|>"]
    maker = builder(template, end_ids=[TOKENIZER.convert_tokens_to_ids("<|box_end|>")])
    assert trained(maker.build(Transcript(messages=chat), "t")) == ["Hello.<|box_end|>", "Bye.<|im_end|>"]


def test_another_end_of_turn_than_the_tokenizers_eos() -> None:
    template = PLAIN.replace("<|im_end|>", "<|quad_end|>")
    example = build(CHAT, template)
    assert trained(example) == ["Hello.<|quad_end|>", "Bye.<|quad_end|>"]
    assert END not in example.sequences[0].ids


def test_control_tokens_that_cannot_be_told_apart_are_refused() -> None:
    assistant = "{{ '<|im_start|>assistant\\n<|box_start|>' + m.content + '<|im_end|>\\n' }}"
    chat = [CHAT[0], {"role": "assistant", "content": "a <|box_start|> b"}]
    with pytest.raises(ExampleError, match=r"messages\[1\] spells out control tokens \(<\|box_start\|>\)"):
        build(chat, chatml(assistant))


def test_an_end_that_is_not_special() -> None:
    """Known from the generation config only. Spelt out by the assistant, it cannot be written as plain text."""
    template = PLAIN.replace("<|im_end|>", "</tool_call>")
    maker = builder(template, end_ids=[TOKENIZER.convert_tokens_to_ids("</tool_call>")])
    assert trained(maker.build(Transcript(messages=CHAT), "t")) == ["Hello.</tool_call>", "Bye.</tool_call>"]
    chat = [CHAT[0], {"role": "assistant", "content": "a </tool_call> b"}]
    with pytest.raises(ExampleError, match=r"messages\[1\] spells out control tokens"):
        maker.build(Transcript(messages=chat), "t")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        # No end: the model could not learn to stop.
        (chatml("{{ 'assistant: ' + m.content + '\\n' }}", prompt="assistant:"), "no end-of-turn token"),
        # DeepSeek R1's way: the prompt opens a think block that no rendered turn has.
        (
            chatml(
                "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}", "<|im_start|>assistant\n<think>\n"
            ),
            "no prefix of the rendering with it",
        ),
        # The number of messages stands at the front: every rendering contradicts the one before.
        ("{{ messages | length }}" + PLAIN, "no prefix of the rendering with it"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(template: str, problem: str) -> None:
    with pytest.raises(ExampleError, match=rf"messages\[1\].*{problem}"):
        build(CHAT[:2], template)
