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

LONGEST = 512
"""Tokens of a row: attention grows with their square."""


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


def make_rows(examples: Sequence[Example], device: torch.device, longest: int = LONGEST) -> list[Row]:
    """Rows over all sequences of `examples`; one that is longer than `longest` has a row of its own."""
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


def token_losses(model: Any, row: Row) -> Tensor:
    """NLL of each trained token, fp32 [N], differentiable. model: a causal language model of transformers."""
    hidden = model.model(
        input_ids=row.ids, position_ids=row.positions, attention_mask=row.sees, use_cache=False
    ).last_hidden_state  # [1, T, H]
    logits = model.lm_head(hidden[0, row.before]).float()  # [N, V]
    return torch.nn.functional.cross_entropy(logits, row.targets, reduction="none")


def backward(model: Any, examples: Sequence[Example], device: torch.device) -> float:
    """Add the gradient of the mean over trained tokens of `examples`; returns that mean."""
    count, total = sum(example.trained_tokens for example in examples), 0.0
    for row in make_rows(examples, device):
        loss = token_losses(model, row).sum() / count
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], device: torch.device) -> list[float]:
    """Mean NLL per trained token of each example."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for row in make_rows(examples, device):
        sums.index_add_(0, row.owners.cpu(), token_losses(model, row).double().cpu())
    return [float(sums[i]) / example.trained_tokens for i, example in enumerate(examples)]
