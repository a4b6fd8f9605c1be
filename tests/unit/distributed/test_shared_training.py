"""Replicas are one trainer: the same weights on each, and those that one process makes of the same parts."""

from pathlib import Path

import pytest
import torch
from replica_parts import built, digest, replicas, train, trainer_of

from worker.data.division import divided, has_work
from worker.data.examples import Example, TokenSequence
from worker.trainer.sharing import InTurn


@pytest.mark.parametrize(("way", "count"), [("burst", 3), ("streaming", 2), ("factors", 2)])
def test_replicas_are_equal_bit_for_bit_and_one_process_repeats_them(
    tiny_model: Path, tmp_path: Path, way: str, count: int
) -> None:
    """All kinds of feedback, batches of one to five: with two or three replicas some have nothing to do."""
    check(tiny_model, tmp_path, way, count, versions=5)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "count"), [("burst", 2), ("streaming", 3), ("factors", 3)])
def test_after_a_hundred_versions_too(tiny_model: Path, tmp_path: Path, way: str, count: int) -> None:
    check(tiny_model, tmp_path, way, count, versions=100)


def check(tiny_model: Path, tmp_path: Path, way: str, count: int, versions: int) -> None:
    first, *others = replicas(tiny_model, tmp_path, count, way, versions)
    assert all(other == first for other in others), "losses, likelihoods, norms, weights and state"
    assert len({version["digest"] for version in first}) == versions
    if way == "burst":
        lost = f"SharedFailureError: replica {count - 1}: MemoryError: no room for this part"
        assert first[0].pop("failed") == lost, "what fails at one is raised at every one, and the next batch goes on"
    again = trainer_of(tiny_model, way)
    again.sharing = InTurn(count)
    assert train(again, built(tiny_model, versions)) == first


def test_a_row_a_replica_has_the_bits_of_a_row_a_pass(tiny_model: Path) -> None:
    """One process that trains two transcripts in its own way, in a forward pass each, and two replicas."""
    ours, plain = trainer_of(tiny_model, "burst"), trainer_of(tiny_model, "burst")
    ours.sharing = InTurn(2)
    for trainer in (ours, plain):
        trainer.sizes, trainer.budget = (512,), 512
    batches = [batch[:2] for batch in built(tiny_model, 4) if all(len(e.sequences) == 1 for e in batch[:2])]
    batches = [batch for batch in batches if len(plain._batches(batch)) == 2]
    assert len(batches) > 1
    train(ours, batches)
    train(plain, batches)
    assert digest(ours) == digest(plain)


def test_in_fp32_division_changes_gradients_by_rounding_alone(tiny_model: Path) -> None:
    batch = built(tiny_model, 4)[3]
    ours, plain = trainer_of(tiny_model, "burst", "float32"), trainer_of(tiny_model, "burst", "float32")
    ours.sharing = InTurn(3)
    assert ours.begin(batch).loss == pytest.approx(plain.begin(batch).loss, rel=1e-6)
    for (name, mine), theirs in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            off = torch.linalg.vector_norm(mine.grad - theirs.grad)
            assert off <= 1e-5 * torch.linalg.vector_norm(theirs.grad), name


def test_a_division_has_every_transcript_once_and_no_part_is_much_longer(tiny_model: Path) -> None:
    for batch in built(tiny_model, 5):
        for count in (2, 3):
            parts = divided(batch, count)
            assert has_work(parts[0])
            for i, example in enumerate(batch):
                assert [part[i] for part in parts if part[i].sequences] == [example]
            loads = [sum(one.tokens + one.teacher_tokens for one in part) for part in parts]
            assert max(loads) - min(loads) <= max(one.tokens + one.teacher_tokens for one in batch)


def test_who_has_a_long_one_has_few() -> None:
    lengths = (30, 100, 30, 30)
    batch = [Example(str(n), (TokenSequence((1,) * n, (False,) + (True,) * (n - 1)),), 1.0, {}) for n in lengths]
    first, second = divided(batch, 2)
    assert [bool(one.sequences) for one in first] == [False, True, False, False]
    assert [bool(one.sequences) for one in second] == [True, False, True, True]
