"""Batched equals separate: on the rows, and on logits and gradients of a real small Qwen3.5."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.data.batch_capacity import BatchCapacity, sizes_up_to
from worker.data.examples import Example, TokenSequence
from worker.data.packing import Batch, BatchError, make_batches, pack

WIDTHS = (8, 16, 80)


def example(id: str, lengths: list[int], weight: float = 1.0, vocabulary: int = 1000) -> Example:
    """An example of sequences of these lengths; every second token is trained."""
    generator = torch.Generator().manual_seed(sum(map(ord, id)) + sum(lengths))
    sequences = []
    for length in lengths:
        ids = tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())
        sequences.append(TokenSequence(ids, tuple(i % 2 == 1 for i in range(length))))
    return Example(id, tuple(sequences), weight, {})


Row = tuple[int, tuple[int, ...], tuple[bool, ...]]


def real_rows(batches: list[Batch]) -> list[Row]:
    """(example, ids, mask) of every sequence, read back from the batches."""
    rows = []
    for batch in batches:
        for start, length in zip(starts(batch), batch.lengths.tolist(), strict=True):
            inside = (batch.before + 1 >= start) & (batch.before + 1 < start + length)
            if not inside.any():
                continue  # padding
            ids = batch.input_ids.flatten()[start : start + length].tolist()
            mask = torch.zeros(length, dtype=torch.bool)
            mask[batch.before[inside] + 1 - start] = True
            assert batch.targets[inside].tolist() == [ids[i] for i in mask.nonzero()[:, 0].tolist()]
            (owner,) = batch.examples[inside].unique().tolist()
            rows.append((owner, tuple(ids), tuple(mask.tolist())))
    return rows


def starts(batch: Batch) -> list[int]:
    """Where each sequence begins in the flat batch."""
    if batch.packed:
        return [0, *batch.lengths.cumsum(0)[:-1].tolist()]
    return [row * batch.input_ids.shape[1] for row in range(len(batch.lengths))]


def expected_rows(examples: list[Example]) -> list[Row]:
    return [(i, sequence.ids, sequence.mask) for i, one in enumerate(examples) for sequence in one.sequences]


@settings(deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(2, 80), min_size=1, max_size=3), max_size=9),
    budget=st.integers(80, 400),
)
def test_every_sequence_once_and_whole(lengths: list[list[int]], budget: int) -> None:
    examples = [example(f"e{i}", some) for i, some in enumerate(lengths)]
    batches = make_batches(examples, pad_id=7, widths=WIDTHS, budget=budget)
    # Rows are grouped by width; within a width the order is the examples'.
    width = {length: next(w for w in WIDTHS if length <= w) for length in range(2, 81)}
    assert real_rows(batches) == sorted(expected_rows(examples), key=lambda row: width[len(row[1])])
    for batch in batches:
        height, wide = batch.input_ids.shape
        assert wide in WIDTHS and height & (height - 1) == 0 and height * wide <= budget
        assert not batch.packed and len(batch.lengths) == height
        padding = torch.arange(wide) >= batch.lengths[:, None]
        assert bool((batch.input_ids[padding] == 7).all())
        empty = batch.lengths == 0
        assert empty.sum() < max(height / 2, 1)  # never so many that half as many rows would have done


@settings(deadline=None)
@given(lengths=st.lists(st.lists(st.integers(2, 2000), min_size=1, max_size=3), min_size=1, max_size=9))
def test_packed_every_sequence_once_and_whole(lengths: list[list[int]]) -> None:
    examples = [example(f"e{i}", some) for i, some in enumerate(lengths)]
    batches = pack(examples, pad_id=7, sizes=(256, 1024, 2048))
    assert real_rows(batches) == expected_rows(examples)
    for batch in batches:
        assert batch.packed and batch.input_ids.shape in ((1, 256), (1, 1024), (1, 2048))
        assert int(batch.lengths.sum()) == batch.input_ids.shape[1] and int(batch.lengths.min()) > 0
        dtypes = {batch.input_ids.dtype, batch.before.dtype, batch.targets.dtype, batch.examples.dtype}
        assert dtypes == {torch.int64}
        used = sum(len(ids) for _, ids, _ in real_rows([batch]))
        assert bool((batch.input_ids[0, used:] == 7).all())
        assert batch.input_ids.shape[1] == min(size for size in (256, 1024, 2048) if size >= used)


@pytest.mark.parametrize("longest", [1, 512, 513, 2048, 4096, 5000, 8192, 100_000])
def test_sizes_of_packed_rows(longest: int) -> None:
    sizes = sizes_up_to(longest)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] >= longest
    assert len(sizes) == 1 or sizes[-2] < longest
    assert all(size % 64 == 0 for size in sizes) and all(2 * a >= b for a, b in pairwise(sizes))


def test_refusals() -> None:
    with pytest.raises(BatchError, match="2049 tokens is wider than the widest row, 2048"):
        pack([example("a", [2049])], pad_id=0, sizes=(1024, 2048))
    with pytest.raises(BatchError, match="81 tokens is wider than the widest row, 80"):
        make_batches([example("a", [81])], pad_id=0, widths=WIDTHS, budget=80)
    with pytest.raises(BatchError, match="budget of 79"):
        make_batches([], pad_id=0, widths=WIDTHS, budget=79)
    with pytest.raises(BatchError, match="a row of each width"):
        make_batches([], pad_id=0, widths=(), budget=79)


# On a real model

LENGTHS = [[9, 70], [66], [3], [80, 13]]  # 66 to 80: the delta net's chunks of 64 tokens are crossed, beside padding
WEIGHTS = [1.0, 0.5, 0.25, 1.0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from worker.testing.tiny_model import make_tiny

    folder = make_tiny(tmp_path_factory.mktemp("tiny") / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # A fresh model's logits hardly depend on its input: larger weights make a leak visible.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model


def nll_and_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log-likelihood of each row's trained tokens [B], and all logits [B, T, V]."""
    logits = model(input_ids=ids, use_cache=False).logits
    log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # [B, T-1]
    return -(log_p * mask[:, 1:]).sum(1), logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def separately(
    model: Any, examples: list[Example]
) -> tuple[dict[tuple[int, ...], torch.Tensor], dict[str, torch.Tensor]]:
    """The definition: every sequence by itself, unpadded. Logits by ids, and gradients of sum w_i NLL_i."""
    logits = {}
    for one in examples:
        for sequence in one.sequences:
            nll, logit = nll_and_logits(model, torch.tensor([sequence.ids]), torch.tensor([sequence.mask]))
            (one.weight * nll.sum()).backward()
            logits[sequence.ids] = logit[0].detach()
    return logits, gradients(model)


def batched(model: Any, examples: list[Example], widths: tuple[int, ...], pad_id: int) -> tuple[Any, Any]:
    """The same through make_batches, padding rows included."""
    logits = {}
    batches = make_batches(examples, pad_id=pad_id, widths=widths, budget=1024)
    assert any((batch.lengths == 0).any() for batch in batches)
    for batch in batches:
        logit = model(input_ids=batch.input_ids, use_cache=False).logits  # [B, T, V]
        log_p = logit.flatten(0, 1)[batch.before].log_softmax(-1)  # [N, V]
        nll = -log_p.gather(1, batch.targets[:, None])[:, 0]  # [N]
        weights = torch.tensor([one.weight for one in examples])[batch.examples]  # [N]
        (nll * weights).sum().backward()
        for r, length in enumerate(batch.lengths.tolist()):
            if length:
                logits[tuple(batch.input_ids[r, :length].tolist())] = logit[r, :length].detach()
    return logits, gradients(model)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(f"e{i}", some, w) for i, (some, w) in enumerate(zip(LENGTHS, WEIGHTS, strict=True))]


@pytest.mark.parametrize("widths", [(80,), (16, 128)])
def test_batched_equals_separate(model: Any, examples: list[Example], widths: tuple[int, ...]) -> None:
    expected_logits, expected = separately(model, examples)
    logits, found = batched(model, examples, widths, pad_id=0)
    assert logits.keys() == expected_logits.keys() and len(logits) == 6
    for ids in logits:
        torch.testing.assert_close(logits[ids], expected_logits[ids], rtol=1e-4, atol=1e-5)
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        # The decay's gradients are small differences of large sums, which fp32 adds in another order per shape.
        decay = name.endswith(("A_log", "dt_bias", "in_proj_a.weight"))
        assert (gradient - expected[name]).abs().max() <= (1e-3 if decay else 2e-5) * scale, name


def test_padding_contributes_nothing(model: Any, examples: list[Example]) -> None:
    """Whatever token the padding is, rows and columns of it change no bit of logits or gradients of the rest."""
    logits, found = batched(model, examples, (80,), pad_id=0)
    other_logits, other = batched(model, examples, (80,), pad_id=999)
    assert all(torch.equal(logits[ids], other_logits[ids]) for ids in logits)
    for name in found.keys() - {"model.embed_tokens.weight"}:
        assert torch.equal(found[name], other[name]), name
    used = sorted({id for one in examples for sequence in one.sequences for id in sequence.ids})
    unused = [id for id in range(1024) if id not in used]
    assert 999 in unused or 0 in unused  # one of the pad tokens is nobody's text: its gradient is the padding's alone
    for table in (found["model.embed_tokens.weight"], other["model.embed_tokens.weight"]):
        assert not table[unused].any() and table[used].any()


def test_what_a_leak_would_look_like(model: Any) -> None:
    """The same comparison does see a neighbour in the row: one sequence packed behind another differs."""
    first, second = example("a", [66]).sequences[0], example("b", [9]).sequences[0]
    _, alone = nll_and_logits(model, torch.tensor([second.ids]), torch.tensor([second.mask]))
    packed = torch.tensor([first.ids + second.ids])
    _, logits = nll_and_logits(model, packed, torch.zeros_like(packed, dtype=torch.bool))
    assert (logits[0, -9:] - alone[0]).abs().max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_every_trained_token_knows_its_place_in_its_example(packed: bool) -> None:
    """However widths and rows order the sequences."""
    examples = [example("a", [40, 5, 12]), example("b", [7]), example("c", [70, 3, 9])]
    batches = (
        pack(examples, pad_id=0, sizes=[80]) if packed else make_batches(examples, pad_id=0, widths=WIDTHS, budget=80)
    )
    found: dict[int, dict[int, int]] = {0: {}, 1: {}, 2: {}}
    for batch in batches:
        for owner, order, target in zip(
            *(part.tolist() for part in (batch.examples, batch.order, batch.targets)), strict=True
        ):
            found[owner][order] = target
    for owner, one in enumerate(examples):
        trained = [t for s in one.sequences for t, m in zip(s.ids, s.mask, strict=True) if m]
        assert [found[owner][i] for i in range(len(trained))] == trained and len(found[owner]) == len(trained)


def test_what_a_teacher_reads_needs_a_row_for_each_sequence_and_not_one_for_all() -> None:
    one = example("a", [300, 100])
    taught = replace(one, teachers=tuple(sequence for sequence in example("b", [450, 480, 490]).sequences))
    for way, alone, beside in (("burst", 300, 490), ("streaming", 400, 490)):
        room = BatchCapacity((512,), True, way, 0)  # type: ignore[arg-type]
        assert room.needs([one]) == alone and room.needs([taught]) == beside and room.holds([taught])
    longer = replace(one, teachers=example("b", [513]).sequences)
    assert not room.holds([longer]) and room.needs([longer]) == 513
