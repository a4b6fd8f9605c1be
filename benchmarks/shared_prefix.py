"""Examples that begin alike, in few tokens: a row holds their common beginning once, and then what differs.

A chat template's system message begins every conversation; a third to a half of a short one is that. A row is

    prefix | rest of example 1 | rest of example 2 | ...

where each rest sees the prefix and itself, at the positions that it has alone. Logits and gradients are those of
separate sequences, up to the order of sums. Only for models of attention alone: a recurrent layer reads the row from
end to end.
Must not know: optimizers. Invariant: every trained token of every example stands in exactly one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worker.data.examples import Example, TokenSequence

LONGEST = {"cpu": 512, "cuda": 2048}
"""Tokens of a row, by device: attention grows with their square, and a GPU waits for the host between short rows."""


@dataclass(frozen=True)
class Row:
    """One row of T tokens, N of them trained."""

    ids: Tensor
    """int64 [1, T]"""
    positions: Tensor
    """int64 [1, T]"""
    sees: Tensor
    """bool [1, 1, T, T]"""
    before: Tensor
    """int64 [N]: the position before each trained token."""
    targets: Tensor
    """int64 [N]"""
    owners: Tensor
    """int64 [N]: index of the token's example."""


def make_rows(examples: Sequence[Example], device: torch.device, longest: int | None = None) -> list[Row]:
    """Rows over all sequences of `examples`; one that is longer than `longest` (LONGEST) has a row of its own."""
    longest = longest or LONGEST[device.type]
    found = [(sequence, owner) for owner, example in enumerate(examples) for sequence in example.sequences]
    found.sort(key=lambda pair: pair[0].ids)  # neighbours begin alike
    rows: list[list[tuple[TokenSequence, int]]] = []
    for pair in found:
        if rows and _tokens([*rows[-1], pair]) <= longest:
            rows[-1].append(pair)
        else:
            rows.append([pair])
    return [_row(some, device) for some in rows]


def _common(some: Sequence[tuple[TokenSequence, int]]) -> int:
    """Length of the prefix: what all share, up to the token before the first trained one."""
    most = min(sequence.mask.index(True) - 1 for sequence, _ in some)
    first, last = some[0][0].ids, some[-1][0].ids  # sorted: the ends differ first
    return next((i for i in range(most) if first[i] != last[i]), most)


def _tokens(some: Sequence[tuple[TokenSequence, int]]) -> int:
    common = _common(some)
    return common + sum(len(sequence.ids) - common for sequence, _ in some)


def _row(some: Sequence[tuple[TokenSequence, int]], device: torch.device) -> Row:
    common = _common(some)
    ids, positions, groups = list(some[0][0].ids[:common]), list(range(common)), [-1] * common
    before, targets, owners = [], [], []
    for group, (sequence, owner) in enumerate(some):
        shift = len(ids) - common
        trained = [i for i, wanted in enumerate(sequence.mask) if wanted]
        before += [i - 1 + shift for i in trained]
        targets += [sequence.ids[i] for i in trained]
        owners += [owner] * len(trained)
        ids += sequence.ids[common:]
        positions += range(common, len(sequence.ids))
        groups += [group] * (len(sequence.ids) - common)
    group_of = torch.tensor(groups)
    sees = ((group_of[:, None] == group_of[None]) | (group_of[None] < 0)).tril()
    one = [torch.tensor(values, device=device) for values in (ids, positions, before, targets, owners)]
    return Row(one[0][None], one[1][None], sees[None, None].to(device), *one[2:])


def token_logits(model: Any, row: Row) -> Tensor:
    """fp32 [N, V] before each trained token, differentiable. model: a causal language model of transformers."""
    hidden = model.model(
        input_ids=row.ids, position_ids=row.positions, attention_mask=row.sees, use_cache=False
    ).last_hidden_state  # [1, T, H]
    logits: Tensor = model.lm_head(hidden[0, row.before])
    return logits.float()


def token_losses(model: Any, row: Row) -> Tensor:
    """NLL of each trained token, fp32 [N], differentiable."""
    return torch.nn.functional.cross_entropy(token_logits(model, row), row.targets, reduction="none")


def backward(model: Any, examples: Sequence[Example], device: torch.device) -> float:
    """Add the gradient of the mean over trained tokens of `examples`; returns that mean."""
    count, total = sum(example.trained_tokens for example in examples), 0.0
    for row in make_rows(examples, device):
        loss = token_losses(model, row).sum() / count
        loss.backward()
        total += float(loss.detach())
    return total


class Asked:
    """Examples that are scored again and again, as rows that are made once. `source`: also kept, and compared with."""

    def __init__(self, examples: Sequence[Example], device: torch.device, source: Any = None) -> None:
        self.rows = make_rows(examples, device)
        self._tokens = torch.tensor([example.trained_tokens for example in examples])
        self._before = [] if source is None else [self._distribution(source, row) for row in self.rows]

    @staticmethod
    @torch.no_grad()
    def _distribution(model: Any, row: Row) -> Tensor:
        """Log-probabilities, fp32 [N, V]."""
        return torch.log_softmax(token_logits(model, row), dim=-1)

    @torch.no_grad()
    def losses(self, model: Any) -> list[float]:
        """Mean NLL per trained token of each example."""
        return self._means([token_losses(model, row) for row in self.rows])

    @torch.no_grad()
    def compare(self, model: Any) -> tuple[list[float], list[float]]:
        """`losses`, and of each example the mean KL(source | model) before its trained tokens, in nats."""
        losses, divergences = [], []
        for row, before in zip(self.rows, self._before, strict=True):
            after = self._distribution(model, row)
            losses.append(-after.gather(1, row.targets[:, None])[:, 0])
            divergences.append((before.exp() * (before - after)).sum(1))
        return self._means(losses), self._means(divergences)

    def _means(self, values: list[Tensor]) -> list[float]:
        owners = torch.cat([row.owners for row in self.rows]).cpu()
        sums = torch.zeros(len(self._tokens), dtype=torch.float64)
        sums.index_add_(0, owners, torch.cat(values).double().cpu())
        return [float(value) for value in sums / self._tokens]


def score(model: Any, examples: Sequence[Example], device: torch.device) -> list[float]:
    """Mean NLL per trained token of each example."""
    return Asked(examples, device).losses(model)
