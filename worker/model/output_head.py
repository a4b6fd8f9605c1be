"""What a causal language model does after its last hidden states, found by asking its own forward.

    head = head_of(model)
    logits = logits_of(hidden, head.weight, 0, head.after)      # those of model(...), for model.base_model's hidden

`forward` is called with a body and a head that only hand over chosen numbers, so nothing is computed on the way. What
it makes of the numbers tells the scale (Granite, Cohere), the cap (Gemma 2) and whether anything else is done. No model
and no field of a configuration is named here.

Must not know: the optimizer, examples.
Invariants: the model is as it was afterwards; what does not have the form of `After` is a `HeadError`, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from producer.errors import TandemError
from worker.model.head_blocks import After
from worker.model.replaced import replaced
from worker.model.vocabulary_shard import VocabularyShard

ROWS = 4
CLOSE = 1e-4
"""Relative: forward runs on fp32 here."""


class HeadError(TandemError):
    """The model makes its logits in a way that Tandem's loss does not know."""


@dataclass(frozen=True)
class OutputHead:
    """logits = After(hidden @ weight^T), where hidden are the last hidden states of `model.base_model`."""

    weight: Tensor
    """[V, H]"""
    after: After
    vocabulary: VocabularyShard | None = None
    """Which rows of the whole head `weight` has, where it is one process's part."""

    @property
    def words(self) -> int:
        """Of the whole vocabulary."""
        return len(self.weight) if self.vocabulary is None else self.vocabulary.words


class _Output:
    """What a body returns: its last hidden states, and None for whatever else is asked of it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@torch.no_grad()
def head_of(model: Any) -> OutputHead:
    """Of `model`, a transformers causal language model on any device, the meta device too. Raises `HeadError`."""
    head, kind = model.get_output_embeddings(), type(model).__name__
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        raise HeadError(
            f"{kind} has no plain linear layer as its output head ({type(head).__name__}): not trainable here"
        )
    states, logits, reached = _probe(head)
    with (
        replaced(model.base_model, lambda *_, **__: _Output(states)),
        replaced(head, _hand_over(logits, reached)),
    ):
        try:
            found = model(
                input_ids=torch.zeros(1, ROWS, dtype=torch.int64, device=states.device), use_cache=False
            ).logits
        except HeadError:
            raise
        except Exception as error:
            raise HeadError(f"{kind}'s forward cannot be asked what it does with its logits ({error})") from error
    if len(reached) != 1 or reached[0].shape != states.shape or found.shape != logits.shape:
        raise HeadError(
            f"{kind}'s forward does not hand its last hidden states to its output head once: not trainable here"
        )
    before = _ratio(kind, reached[0].float(), states)
    scale, cap = _fit(kind, found.float(), logits)
    if before != 1.0 and head.bias is not None:
        raise HeadError(f"{kind} scales its hidden states before a head with a bias: not trainable here")
    return OutputHead(head.weight, After(before * scale, cap, head.bias), getattr(model, "vocabulary", None))


def _probe(head: torch.nn.Linear) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Hidden states [1, ROWS, H] and logits [1, ROWS, V], fp32 values that bf16 holds too; where what reaches the head
    goes. Every column of the logits gets small and large values, of both signs."""
    device = torch.device("cpu") if head.weight.is_meta else head.weight.device
    powers = torch.tensor([2.0**power for power in range(-10, 21, 2)], device=device)
    grid = torch.cat([powers, -powers, powers.new_zeros(1)])
    rows, columns = torch.arange(ROWS, device=device)[:, None], torch.arange(head.out_features, device=device)
    logits = grid[(columns * 7 + rows * 5) % len(grid)]
    states = torch.arange(ROWS * head.in_features, device=device).float().reshape(ROWS, -1) % 127 - 63
    return states[None], logits[None], []


def _hand_over(logits: Tensor, reached: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        reached.append(hidden)
        return logits.clone()

    return forward


def _ratio(kind: str, found: Tensor, given: Tensor) -> float:
    """found / given, which is one number for all."""
    ratio = float((found * given).sum() / given.square().sum())
    if not torch.allclose(found, ratio * given, rtol=CLOSE, atol=CLOSE):
        raise HeadError(f"{kind} changes its last hidden states before the output head, and not by one factor")
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


def _fit(kind: str, found: Tensor, given: Tensor) -> tuple[float, float | None]:
    """(scale, cap) so that found = cap * tanh(scale * given / cap); cap None where nothing is flattened."""
    small, large = given == 2.0**-10, given == 2.0**20
    scale = float(found[small].mean() / 2.0**-10)
    most = float(found[large].mean())
    cap = None if abs(most - scale * 2.0**20) <= CLOSE * abs(most) else most
    expected = scale * given if cap is None else cap * torch.tanh(scale * given / cap)
    if not scale > 0 or (cap is not None and cap <= 0) or not torch.allclose(found, expected, rtol=CLOSE, atol=1e-6):
        raise HeadError(
            f"{kind} changes its logits after the output head, and neither by a factor nor by a cap (tanh): its loss is"
            " not known here"
        )
    return (1.0 if abs(scale - 1) < 1e-6 else scale), cap
