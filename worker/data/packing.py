"""Examples -> batches of a few fixed shapes: rows padded on the right, or sequences packed into one row.

Must not know: Redis, vLLM.
Invariants: every sequence stands in exactly one row, whole. `make_batches` gives a row to one sequence, from column 0,
so that nothing leaks between examples (causal attention and the gated delta net never look to the right, where the
padding is); `pack` puts several into the one row of a batch, for kernels that are told where each begins. Shapes are
few: a function compiled or tuned for one of them is seldom compiled again. The order depends on the input alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from producer.errors import TandemError
from worker.data.examples import Example, TokenSequence

PIECE = 512
"""The longest sequence of padding in a packed row, in tokens: attention over it is wasted and grows with its square."""


class BatchError(TandemError):
    """A sequence fits into no row, the widths and the budget contradict each other, or there is too much for one."""


@dataclass
class Batch:
    """B rows of T tokens, N of them trained: each is predicted by the model's output at the position before it."""

    input_ids: torch.Tensor
    """int64 [B, T], the pad token where nothing stands."""
    before: torch.Tensor
    """int64 [N]: row * T + column of the position before each trained token, ascending."""
    targets: torch.Tensor
    """int64 [N]: the trained tokens."""
    examples: torch.Tensor
    """int64 [N]: index of the token's example among those given."""
    rejected: torch.Tensor
    """bool [N]: whether the token is of an answer that another is to be preferred to."""
    order: torch.Tensor
    """int64 [N]: the token's place among all trained tokens of its example."""
    lengths: torch.Tensor
    """int64 [S]: tokens of each sequence. Of rows: S = B, 0 for a row of padding. Packed: in order, the padding cut
    into sequences of its own, so that they add up to T."""
    packed: bool


def make_batches(examples: Sequence[Example], *, pad_id: int, widths: Sequence[int], budget: int) -> list[Batch]:
    """Padded rows: every sequence of `examples` once, B * T <= `budget` tokens a batch, narrow ones first.

    A row's width is the least of `widths` that holds its sequence; B is a power of two. Raises BatchError.
    """
    widths = sorted(set(widths))
    if not widths or widths[0] < 1 or budget < widths[-1]:
        raise BatchError(f"the budget of {budget} tokens must hold a row of each width {tuple(widths)}")
    by_width: dict[int, list[tuple[int, int, TokenSequence]]] = {width: [] for width in widths}
    for index, first, sequence in _sequences(examples):
        by_width[_least(widths, len(sequence.ids))].append((index, first, sequence))
    batches = []
    for width, rows in by_width.items():
        most = 1 << ((budget // width).bit_length() - 1)  # the largest power of two that fits
        for start in range(0, len(rows), most):
            some = rows[start : start + most]
            height = 1 << (len(some) - 1).bit_length()  # the next power of two
            places = [(row * width, *which) for row, which in enumerate(some)]
            lengths = [len(sequence.ids) for _, _, sequence in some] + [0] * (height - len(some))
            batches.append(_batch(places, (height, width), pad_id, lengths, packed=False))
    return batches


def pack(examples: Sequence[Example], *, pad_id: int, sizes: Sequence[int]) -> list[Batch]:
    """Packed rows: batches of one row each, filled in order; its length is the least of `sizes` that holds it.

    Raises BatchError for a sequence that is longer than all of them.
    """
    sizes = sorted(set(sizes))
    rows: list[list[Place]] = []
    used = sizes[-1]
    for index, first, sequence in _sequences(examples):
        _least(sizes, len(sequence.ids))
        if used + len(sequence.ids) > sizes[-1]:
            rows.append([])
            used = 0
        rows[-1].append((used, index, first, sequence))
        used += len(sequence.ids)
    batches = []
    for places in rows:
        lengths = [len(sequence.ids) for _, _, _, sequence in places]
        size = _least(sizes, sum(lengths))
        padding = size - sum(lengths)
        lengths += [PIECE] * (padding // PIECE) + [padding % PIECE] * (padding % PIECE > 0)
        batches.append(_batch(places, (1, size), pad_id, lengths, packed=True))
    return batches


Place = tuple[int, int, int, TokenSequence]
"""Position of a sequence's first token in the flat batch, index of its example, place of its first trained token among
the example's, and the sequence."""


def _sequences(examples: Sequence[Example]) -> Iterator[tuple[int, int, TokenSequence]]:
    for index, example in enumerate(examples):
        first = 0
        for sequence in example.sequences:
            yield index, first, sequence
            first += sum(sequence.mask)


def _least(sizes: Sequence[int], length: int) -> int:
    """The least of the ascending `sizes` that holds `length` tokens."""
    for size in sizes:
        if length <= size:
            return size
    raise BatchError(
        f"a sequence of {length} tokens is wider than the widest row, {sizes[-1]}: "
        "build examples with max_tokens no higher than that"
    )


def _batch(
    places: Sequence[Place],
    shape: tuple[int, int],
    pad_id: int,
    lengths: Sequence[int],
    *,
    packed: bool,
) -> Batch:
    """places: in the order of their positions."""
    flat = torch.full((shape[0] * shape[1],), pad_id, dtype=torch.int64)  # [B * T]
    trained, owners, sides, orders = [], [], [], []
    for start, index, first, sequence in places:
        flat[start : start + len(sequence.ids)] = torch.tensor(sequence.ids)
        positions = start + torch.tensor(sequence.mask).nonzero()[:, 0]
        trained.append(positions)
        owners.append(torch.full_like(positions, index))
        orders.append(first + torch.arange(len(positions)))
        sides.append(torch.full_like(positions, sequence.rejected, dtype=torch.bool))
    at = torch.cat(trained)  # [N]
    owner = torch.cat(owners)  # [N]
    return Batch(
        input_ids=flat.view(shape),
        before=at - 1,
        targets=flat[at],
        examples=owner,
        rejected=torch.cat(sides),  # [N]
        order=torch.cat(orders),  # [N]
        lengths=torch.tensor(lengths, dtype=torch.int64),
        packed=packed,
    )
