"""The head's loss by kernels, against torch's operations: the same values and gradients, and rows apart.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do.
"""

from collections.abc import Iterator

import pytest
import torch
from test_apollo_gpu import DEVICE, INTERPRETED, pytestmark  # noqa: F401
from torch import Tensor

from worker.model import head_blocks, plain_head_loss
from worker.model.loss import head_loss

kernels = pytest.importorskip("worker.model.head_kernels")

TOKENS, WIDTH = 13, 16
WORDS = [296, 301] if INTERPRETED else [248320, 50257]
"""Rows of logits that start at multiples of 16 bytes, and such as do not."""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted, each element costs: several widths in few words."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "WIDTH", 128)
    yield


@pytest.fixture(params=["one block", "several"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several":
        monkeypatch.setattr(head_blocks, "BLOCK", 16 * 128)


def inputs(words: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    weight = torch.randn(words, WIDTH, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    targets = torch.randint(0, words, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, words - 1])
    return hidden, weight, targets.to(DEVICE), torch.rand(tokens, generator=generator).to(DEVICE)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_and_gradients_of_logits(words: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, words).mul(4).to(dtype).to(DEVICE)
    logits[1] += 80
    targets = torch.tensor([0, words - 1, -3, words, 7], device=DEVICE)
    sums, own = kernels.sums_of(logits, targets)
    exact = logits.double()
    inside = (targets >= 0) & (targets < words)
    picked = torch.where(inside, exact.gather(1, targets.clamp(0, words - 1)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(sums.double(), exact.logsumexp(1), rtol=1e-6, atol=1e-5)
    assert torch.equal(own.double(), picked)
    scale = torch.tensor([0.0, 1.0, 0.5, -2.0, 1e-6], device=DEVICE)
    hot = torch.zeros_like(exact)
    hot[inside, targets[inside]] = 1.0
    expected = (exact.softmax(1) - hot) * scale.double()[:, None]
    found = kernels.to_gradient_(logits, targets, sums, scale)
    assert found.data_ptr() == logits.data_ptr() and found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
def test_the_loss_is_that_of_torch_s_operations(
    blocks: None, words: int, dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED and words == 50257 and head_blocks.BLOCK < 1 << 20:
        pytest.skip("four hundred blocks say nothing more")
    hidden, weight, targets, factors = inputs(words, dtype)
    found: dict[bool, list[Tensor]] = {}
    for by_kernels in (True, False):
        monkeypatch.setattr(plain_head_loss, "takes", lambda *_, answer=by_kernels: answer)
        hidden.grad = weight.grad = None
        products: list[Tensor] = []

        def keep(left: Tensor, right: Tensor, first: int, into: list[Tensor] = products) -> None:
            into.append(left.double().T @ right.double())

        loss, nll, *_ = head_loss(hidden, weight, targets, factors, keep if kept else None)
        (3 * loss).backward()
        assert not nll.requires_grad and nll.shape == (TOKENS,)
        assert hidden.grad is not None and (weight.grad is None) == kept
        gradient = torch.cat(products) if kept else weight.grad
        assert gradient is not None
        found[by_kernels] = [loss.detach(), nll, hidden.grad, gradient]
    close = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[True][:2], found[False][:2], rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(found[True][2:], found[False][2:], strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).abs().max() <= close * theirs.abs().max()


def test_backward_again_computes_the_logits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_head_loss, "takes", lambda *_: True)
    hidden, weight, targets, factors = inputs(WORDS[0], torch.bfloat16)
    loss = head_loss(hidden, weight, targets, factors).loss
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_poisoned_row_stays_in_its_row(blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_head_loss, "takes", lambda *_: True)
    hidden, weight, targets, factors = inputs(WORDS[0], torch.bfloat16, tokens=3)
    clean = head_loss(hidden, weight, targets, factors).nll
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            hidden[1] = bad
        nll = head_loss(hidden, weight, targets, factors).nll
        assert not torch.isfinite(nll[1]) and torch.equal(nll[::2], clean[::2])


def test_a_word_that_nobody_can_say_leaves_what_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite element of the head, whose logits are -inf for every token: no token that is added makes it NaN."""
    found = []
    for by_kernels in (True, False):
        monkeypatch.setattr(plain_head_loss, "takes", lambda *_, answer=by_kernels: answer)
        hidden, weight, targets, factors = inputs(WORDS[0], torch.float32)
        with torch.no_grad():
            hidden[:, 0] = hidden[:, 0].abs() + 0.1
            weight[5, 0] = -torch.inf
        loss, nll, *_ = head_loss(hidden, weight, targets.where(targets != 5, 6), factors)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(nll).all() and weight.grad is not None
        found.append(weight.grad.double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_logits_that_are_all_far_below_zero() -> None:
    logits = torch.full((2, 40), -3.3e38, device=DEVICE, dtype=torch.bfloat16)
    sums, own = kernels.sums_of(logits, torch.tensor([1, 2], device=DEVICE))
    assert torch.isfinite(sums).all() and torch.equal(own, logits[:, 0].float())
