"""Self-distillation on a GPU: packed with other losses against transformers one by one, in every way of applying, and
beside replayed rows. Needs what test_model_gpu.py needs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_model_gpu import VOCABULARY, error, gradients, on_gpu, reference
from test_packing import example
from torch import Tensor

from worker.data.examples import Example, TokenSequence
from worker.memory.plan import Way
from worker.model.soft_targets import TOP

__all__ = ["reference"]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def taught(id: str, lengths: list[int], more: int) -> Example:
    """Its teacher reads `more` tokens before each sequence."""
    one, before = example(id, lengths, 1.0, VOCABULARY), example(id + "?", [more], 1.0, VOCABULARY).sequences[0].ids
    teachers = tuple(TokenSequence((*before, *s.ids), (False,) * more + s.mask) for s in one.sequences)
    return replace(one, kind="comment", teachers=teachers)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [taught("a", [60, 90], 17), example("b", [130], 0.5, VOCABULARY), taught("c", [40], 64)]


def next_words(model: Any, sequences: tuple[TokenSequence, ...]) -> Tensor:
    """log p of every word where a trained token comes: [n, V]."""
    found = []
    for one in sequences:
        logits = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, :-1]
        found.append(logits.log_softmax(-1)[torch.tensor(one.mask[1:])])
    return torch.cat(found)


def lumped(log_p: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([log_p.gather(1, ids), log_p.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)], 1)


def test_with_teachers_packed_on_a_gpu_is_transformers_one_by_one(reference: Any, examples: list[Example]) -> None:
    trainer = on_gpu(reference, kept=4)
    found = trainer.begin(examples)
    ours, losses, sizes = gradients(trainer), {}, 0.0
    total = torch.zeros(())
    reference.zero_grad()
    for one in examples:
        student = next_words(reference, one.sequences)
        if one.kind == "comment":
            with torch.no_grad():
                teacher = next_words(reference, one.teachers)
            ids = teacher.topk(TOP, 1).indices
            q, p = lumped(teacher, ids), lumped(student, ids)
            loss, size = (q.exp() * (q - p)).sum(), float((q.exp() - p.exp()).abs().sum().detach()) / 2
        else:
            targets = torch.tensor([t for s in one.sequences for t, m in zip(s.ids, s.mask, strict=True) if m])
            loss, size = -student.gather(1, targets[:, None]).sum(), float(len(targets))
        total, sizes = total + one.weight * loss, sizes + one.weight * size
        losses[one.id] = float(loss.detach()) / one.trained_tokens
    (total / sizes).backward()
    print("losses", found.losses, losses, "step", found.step_scale)
    assert found.losses == pytest.approx(losses, rel=0.05)
    assert found.step_scale == pytest.approx(sizes / sum(one.trained_tokens for one in examples), rel=0.02)
    errors = {
        n: error(ours[n], p.grad) for n, p in reference.named_parameters() if not n.endswith(("A_log", "dt_bias"))
    }
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    print("furthest gradients", worst)
    assert worst[0][1] < 0.1, worst


@pytest.mark.parametrize("way", ["streaming", "factors"])
def test_with_teachers_every_way_is_burst(reference: Any, examples: list[Example], way: Way) -> None:
    burst, other = on_gpu(reference), on_gpu(reference, way=way)
    ours, theirs = other.begin(examples), burst.begin(examples)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4) and ours.step_scale == pytest.approx(theirs.step_scale)
    other.prepare()
    assert other.apply()["update_rms"] == pytest.approx(burst.apply()["update_rms"], rel=1e-3)
    other.optimizer.check()
    pairs = zip(other.model.named_parameters(), burst.model.parameters(), strict=True)
    same = {name: float((a == b).float().mean()) for (name, a), b in pairs}
    assert min(same.values()) > 0.9, sorted(same.items(), key=lambda item: item[1])[:5]


@pytest.mark.parametrize("way", ["burst", "factors"])
def test_with_teachers_a_replayed_row_is_a_launched_one(reference: Any, examples: list[Example], way: Way) -> None:
    """The student's layers are replayed; the passes without gradients before them are launched."""
    trainer = on_gpu(reference, way=way, kept=4)
    launched = trainer.begin(examples)
    norm = trainer.gradient_norm()
    trainer.forget()
    (batch,) = trainer._batches(examples)
    assert trainer.capture(batch.input_ids.numel())
    for _ in range(2):
        replayed = trainer.begin(examples)
        assert trainer.replayed and not launched.rejected
        assert replayed.losses == pytest.approx(launched.losses, rel=1e-3)
        assert trainer.gradient_norm() == pytest.approx(norm, rel=0.02)
        trainer.forget()


def test_a_teacher_s_rows_may_be_more_than_streaming_s_one(reference: Any) -> None:
    """1,024 tokens are the longest row: the students' fit, the teachers' take two."""
    trainer = on_gpu(reference, way="streaming")
    batch = [taught("a", [400], 300), taught("b", [400], 300)]
    assert trainer.room.holds(batch)
    found = trainer.begin(batch)
    assert set(found.losses) == {"a", "b"} and all(loss > 0 for loss in found.losses.values())
    trainer.apply()
    trainer.optimizer.check()
