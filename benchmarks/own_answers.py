"""The source model's own answers to questions that no run trains: what it is to keep.

They are drawn at temperature 1, so that the mean rise of their loss under other weights estimates the divergence
KL(source | other) a token, which is 0 for the source and more for anything else. Answers by another hand would not do:
a model that learns to answer shortly gets better at them while it forgets.
Must not know: optimizers. Invariant: the same seed on the same device gives the same answers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from worker.data.examples import Example, TokenSequence


@torch.no_grad()
def draw(
    model: Any, examples: Sequence[Example], tokens: int, seed: int = 0, *, greedy: bool = False
) -> list[list[int]]:
    """For each example the ids that the model says after its last prompt, up to `tokens`, its end token included.
    greedy: the likeliest word each time, instead of a draw."""
    prompts = [_prompt(example) for example in examples]
    longest = max(map(len, prompts))
    pad = model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(seed)
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    said = model.generate(
        input_ids=ids.to(model.device), attention_mask=there.to(model.device), max_new_tokens=tokens, **how
    )[:, longest:].tolist()  # fmt: skip
    ends = model.generation_config.eos_token_id
    return [_until(answer, ends if isinstance(ends, list) else [ends]) for answer in said]


def answered(example: Example, answer: Sequence[int]) -> Example:
    """`example` with this answer in place of its last one, all of it scored."""
    prompt = _prompt(example)
    mask = (False,) * len(prompt) + (True,) * len(answer)
    return replace(example, sequences=(TokenSequence((*prompt, *answer), mask),))


def _prompt(example: Example) -> tuple[int, ...]:
    sequence = example.sequences[-1]
    return sequence.ids[: sequence.mask.index(True)]


def _until(answer: list[int], ends: Sequence[int]) -> list[int]:
    return answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))]
