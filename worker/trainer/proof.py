"""The proof that what is trained is the model's own loss: one short row, token by token, by several computations.

    expected = prove_trainer(trainer, model, tokenizer, most)     # transformers' own forward against ours; where rows
                                                                  # are packed, of a sequence behind another as well
    check_loss(expected, nll, "...", "...")                       # and anybody else's

`expect` also measures how far rounding alone moves the loss: plain bf16 code with every linear layer's output moved by
up to one unit in its last place. Nothing here names an architecture: whatever transforms hidden states, masks or logits
in a way that the trainer does not know shows in the numbers.

Must not know: Redis, the server, versions.
Invariants: no weight changes; a loss that is further off than rounding explains is a `ProofError` with both numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from producer.errors import TandemError
from worker.data.examples import Example, TokenSequence
from worker.trainer.trainer import Trainer

log = logging.getLogger("tandem")

ROW = 64
"""Tokens of the row; a model with a sliding window takes as many more than the window."""
LONGEST = 1536
"""Tokens of the longest row: a longer window is not reached."""
BEFORE = 32
"""Tokens of a sequence that stands before the row, where rows are packed."""
STRETCH = 16
"""Tokens over which differences are averaged: one token may be off by chance, a stretch is not."""
LEAST, MOST, FACTOR = 0.02, 0.25, 4.0
"""Nats a token. What is allowed: FACTOR times what rounding does here, between LEAST and MOST."""
TWICE = 2.0
"""Times what rounding does, which is allowed where that is more than MOST: after training went astray, logits may be so
large, and a rollback, which mends them, is proved first too."""
ULP = 2.0**-7
MOST_TEXT = 64 * LONGEST
"""Characters: a tokenizer that makes no row of so many knows no English, and never will."""
TEXT = (
    "In the spring of 1912 the harbour of the small town was widened, because the ships that carried "
    "timber from the north had become too large for it. The engineers measured the depth of the water "
    "every morning, wrote the figures into a ledger, and sent a copy to the capital once a week. Nobody "
    "expected that the work would take four years. When it was finished, the mayor asked the two oldest "
    "sailors what they thought of it. One of them said that the sea would decide. The other counted the "
    "stones of the new wall, found that there were 2,417, and was content. "
)


class ProofError(TandemError):
    """The loss is not the one of the model that is served."""


@dataclass(frozen=True)
class Expected:
    """What transformers' own forward says of a row."""

    ids: tuple[int, ...]
    nll: Tensor
    """fp32 [T - 1], on the host: of each token but the first."""
    noise: float
    """How far rounding moves it, as `distance`."""

    def beginning(self, tokens: int) -> Expected:
        """Of the first `tokens` predicted tokens alone: none of them sees a later one."""
        return Expected(self.ids[: tokens + 1], self.nll[:tokens], self.noise)

    @property
    def bound(self) -> float:
        """The most that another computation may differ, as `distance`."""
        return min(MOST, max(LEAST, FACTOR * self.noise)) if self.noise <= MOST else TWICE * self.noise


def prove_trainer(
    trainer: Trainer,
    model: Any,
    tokenizer: Any,
    most: int,
    expected_of: Callable[[Any, Sequence[int]], Expected] | None = None,
) -> Expected:
    """Compare the loss of `trainer` with that of `model`, which has the same weights and is as transformers wrote it,
    on a row of at most `most` tokens. expected_of: `expect`, where that takes more than this process. Raises
    `ProofError`.

    Weights whose loss is not finite prove nothing, and cannot be trained either (`NOT_FINITE`): that is logged.
    """
    expected = (expected_of or expect)(model, proof_row(tokenizer, model.config, most))
    if not torch.isfinite(expected.nll).all():
        log.warning("the model's loss is not finite under the present weights: nothing can be compared with it")
        return expected
    check_loss(
        expected,
        own_loss(trainer, expected.ids),
        "the loss that Tandem would train",
        "Tandem does not know something that this model's forward does: it cannot be trained by this version",
    )
    if trainer.packed:
        found = packed_loss(trainer, expected.ids)
        check_loss(
            expected.beginning(len(found)),
            found,
            "the loss of a sequence that shares its row with another",
            "Something in this model reaches from one sequence into the next: it cannot be trained in packed rows",
        )
    return expected


def proof_row(tokenizer: Any, config: Any, most: int) -> tuple[int, ...]:
    """The row of a model: ordinary text, of at most `most` tokens. Raises `ProofError` where fewer than two can be had:
    there is no loss then."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    wanted = ROW + window if isinstance(window, int) and ROW + window <= LONGEST else ROW
    text = TEXT
    while len(ids := tokenizer(text)["input_ids"]) < wanted and len(text) < MOST_TEXT:
        text += text
    if min(len(ids), most) < 2:
        why = f"a row has {most} tokens at most: serve with a longer --max-model-len" if most < 2 else (
            f"the model's tokenizer makes {len(ids)} tokens of {len(text):,} characters of English"
        )  # fmt: skip
        raise ProofError(f"nothing can be proved of the loss of this model, and so nothing trained: {why}")
    return tuple(ids[: min(wanted, most)])


@torch.no_grad()
def expect(model: Any, ids: Sequence[int]) -> Expected:
    """By `model(...)` as transformers wrote it, with the attention of the model's own file; `model` is as before
    after."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        nll = _nll(model, ids)
        with _rounded_otherwise(model):
            moved = _nll(model, ids)
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    return Expected(tuple(ids), nll, distance(nll, moved))


def own_loss(trainer: Trainer, ids: Sequence[int]) -> Tensor:
    """By the very code that trains: fp32 [T - 1], on the host."""
    mask = (False, *[True] * (len(ids) - 1))
    return trainer.token_nll(Example("proof", (TokenSequence(tuple(ids), mask),), 1.0, {}))


def packed_loss(trainer: Trainer, ids: Sequence[int]) -> Tensor:
    """As `own_loss`, of a sequence that stands behind another one in the same packed row. A row that does not hold both
    takes the beginning of `ids`: [at most T - 1]."""
    before = tuple(ids[-min(BEFORE, len(ids)) :])
    after = tuple(ids[: trainer.room.longest - len(before)])
    sequences = [TokenSequence(some, (False, *[True] * (len(some) - 1))) for some in (before, after)]
    nll = trainer.token_nll(Example("proof", tuple(sequences), 1.0, {}))
    return nll[len(before) - 1 :]


def distance(one: Tensor, other: Tensor) -> float:
    """Mean difference a token over the stretch of tokens in which it is largest, in nats; inf where one is not
    finite."""
    off = torch.nan_to_num((one - other).abs().double(), nan=torch.inf)
    return float(max(part.mean() for part in off.split(min(STRETCH, len(off)))))


def check_loss(expected: Expected, found: Tensor, whose: str, what_to_do: str) -> float:
    """How far `found`, by `whose` computation, is from what was expected. Raises `ProofError`, which says
    `what_to_do`."""
    off = distance(expected.nll, found)
    if off > expected.bound:
        raise ProofError(
            f"{whose} is not the loss of this model: on a row of {len(expected.ids)} tokens it is"
            f" {float(found.mean()):.3f} nats a token, but {float(expected.nll.mean()):.3f} by transformers' forward."
            f" Over {STRETCH} tokens they are {off:.3f} apart, and rounding explains {expected.bound:.3f}. Nothing was"
            f" trained. {what_to_do}"
        )
    return off


def _nll(model: Any, ids: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1]  # [T - 1, V]
    if (vocabulary := getattr(model, "vocabulary", None)) is not None:  # one process's words, of all
        logits = vocabulary.whole(logits)
    parts = zip(logits.split(ROW), row[0, 1:].split(ROW), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(z.float(), t, reduction="none").cpu() for z, t in parts])


@contextmanager
def _rounded_otherwise(model: torch.nn.Module) -> Iterator[None]:
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(0))
        by = torch.rand(output.shape, generator=generator, device=output.device, dtype=torch.float32)
        return (output * (1 + ULP * (2 * by - 1))).to(output.dtype)

    hooks = [m.register_forward_hook(move) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
