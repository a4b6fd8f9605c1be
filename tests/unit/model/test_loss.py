"""The blocked loss against torch's own: values, both gradients, and that nothing is computed unasked."""

import pytest
import torch
import torch.nn.functional as F

from worker.model import head_blocks as module
from worker.model.loss import linear_cross_entropy

TOKENS, WIDTH, WORDS = 13, 8, 300


@pytest.fixture(params=[1 << 27, 13 * 128, 13 * 7], ids=["one block", "whole tiles", "small"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a block; the number of blocks that follows."""
    monkeypatch.setattr(module, "BLOCK", request.param)
    height = {1 << 27: WORDS, 13 * 128: 128, 13 * 7: 7}[request.param]
    return -(-WORDS // height)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([0, WORDS - 1])
    return hidden, weight, targets, torch.rand(TOKENS, generator=generator)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_torch_s(blocks: int, dtype: torch.dtype, close: float) -> None:
    hidden, weight, targets, factors = inputs(dtype)
    assert len(list(module.blocks_of(weight, TOKENS))) == blocks
    loss, nll = linear_cross_entropy(hidden, weight, targets, factors)
    (3 * loss).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    (3 * expected * factors).sum().backward()
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, (expected * factors).sum())
    assert not nll.requires_grad and loss.dtype == torch.float32
    for ours, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        assert ours is not None and theirs is not None and ours.dtype == dtype
        assert (ours - theirs).abs().max() <= close * theirs.abs().max()


def test_a_frozen_head_and_no_gradients_at_all(blocks: int) -> None:
    hidden, weight, targets, factors = inputs(torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, factors)[0].backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        loss, nll = linear_cross_entropy(hidden, weight, targets, factors)
    assert not loss.requires_grad and torch.isfinite(nll).all()


def test_a_poisoned_row_stays_in_its_row(blocks: int) -> None:
    hidden, weight, targets, factors = inputs(torch.float32)
    with torch.no_grad():
        hidden[4] = torch.nan
    _, nll = linear_cross_entropy(hidden, weight, targets, factors)
    assert torch.isnan(nll).nonzero()[:, 0].tolist() == [4]
