"""Transcripts and examples of a wanted number of tokens.

Must not know: servers, queues, models. Invariant: the same arguments give the same texts.
"""

import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from producer.transcript import Transcript
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, ExampleBuilder, TokenSequence
from worker.trainer.factory import make_builder

WORDS = ("learns", "from", "what", "people", "say", "and", "answers", "with", "it", "in", "one", "short", "walk")
"""Few, so that a model with random weights has something to learn in a few steps."""


def text_builder(model: Path) -> ExampleBuilder:
    """The builder of the model directory `model`, for texts of any length."""
    return make_builder(AutoTokenizer.from_pretrained(model), model, Hyperparameters(max_length=1 << 20))


def conversation(builder: ExampleBuilder, id: str, tokens: int) -> dict[str, Any]:
    """A question and an answer that `builder` makes `tokens` tokens of, or as few less as a word's."""
    draw = random.Random(id)
    words = draw.choices(WORDS, k=tokens)  # a word is a token or more

    def transcript(count: int) -> dict[str, Any]:
        answer = " ".join(words[:count])
        return {
            "id": id,
            "messages": [{"role": "user", "content": f"Tell me of {id}."}, {"role": "assistant", "content": answer}],
        }

    low, high = 1, tokens  # the most words that fit
    while low < high:
        middle = (low + high + 1) // 2
        if builder.build(Transcript.from_dict(transcript(middle)), id).tokens <= tokens:
            low = middle
        else:
            high = middle - 1
    return transcript(low)


def build(builder: ExampleBuilder, transcript: dict[str, Any]) -> Example:
    """What the worker trains of it."""
    return builder.build(Transcript.from_dict(transcript), transcript["id"])


def random_examples(lengths: list[int], vocabulary: int, seed: int) -> list[Example]:
    """An example of random token ids for each of `lengths`; every token but the first is trained."""
    draw = random.Random(seed)
    examples = []
    for number, length in enumerate(lengths):
        ids = tuple(draw.randrange(vocabulary) for _ in range(length))
        sequence = TokenSequence(ids, (False,) + (True,) * (length - 1))
        examples.append(Example(f"{seed}-{number}", (sequence,), 1.0, {}))
    return examples
