"""What the tests of examples share: the real templates, a tokenizer, and readings of an example independent of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.transcript import Transcript
from worker.data.examples import Example, ExampleBuilder
from worker.testing.tiny_model import build_tokenizer

DATA = Path(__file__).parents[1] / "data"
TEMPLATES = {path.stem: path.read_text() for path in sorted((DATA / "chat_templates").glob("*.jinja"))}
TOKENIZER = build_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def builder(template: str = TEMPLATES["qwen3_5_think"], **options: Any) -> ExampleBuilder:
    return ExampleBuilder(TOKENIZER, chat_template=template, **({"max_tokens": 4096} | options))


def build(messages: list[dict[str, Any]], template: str = TEMPLATES["qwen3_5_think"], **fields: Any) -> Example:
    return builder(template).build(Transcript(messages=messages, **fields), "t")


def runs(example: Example) -> Iterator[tuple[list[int], list[int]]]:
    """(everything before it, trained ids) of each unbroken run of trained tokens."""
    for sequence in example.sequences:
        ids, edges = list(sequence.ids), [False, *sequence.mask, False]
        starts = [i for i in range(len(ids)) if edges[i + 1] and not edges[i]]
        ends = [i for i in range(len(ids)) if edges[i + 1] and not edges[i + 2]]
        yield from ((ids[:a], ids[a : b + 1]) for a, b in zip(starts, ends, strict=True))


def trained(example: Example) -> list[str]:
    return [TOKENIZER.decode(ids) for _, ids in runs(example)]


def prompt(messages: Any, template: str, **kwargs: Any) -> list[int]:
    """What a server is prompted with: transformers' own rendering with the generation prompt."""
    return TOKENIZER.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False, **kwargs
    )


QUESTIONS = [{"role": "system", "content": "Be brief."}]
for number in range(6):
    QUESTIONS += [
        {"role": "user", "content": f"Question {number}: what is the capital of France? "},
        {"role": "assistant", "content": f"Answer {number}: the capital of France is Paris."},
    ]
