"""The blocked losses against torch's own: values, both gradients, and that nothing is computed unasked."""

import pytest
import torch
import torch.nn.functional as F

from worker.model import head_blocks as module
from worker.model.head_blocks import After, logits_of
from worker.model.loss import head_loss, linear_cross_entropy
from worker.model.soft_targets import TOP, Soft, teacher_targets

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


# With a teacher


def lumped(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[M, K + 1]: of the words `ids`, and of all others together."""
    return torch.cat([log_p.gather(1, ids), log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)], 1)


def teacher(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """Hidden states of one that expects other words, at most places."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, weight.shape[1], generator=generator).to(dtype)


def test_a_teacher_s_words_are_the_likeliest_and_the_rest_is_lumped(blocks: int) -> None:
    _, weight, _, _ = inputs(torch.float32)
    hidden = teacher(torch.float32, weight)
    soft = teacher_targets(hidden, weight.detach())
    log_q = (hidden @ weight.detach().T).double().log_softmax(1)
    assert torch.equal(soft.ids, log_q.topk(TOP, 1).indices)
    torch.testing.assert_close(soft.log_q, lumped(log_q, soft.ids).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.log_q.exp().sum(1), torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_with_a_teacher_values_and_gradients_are_torch_s(blocks: int, dtype: torch.dtype, close: float) -> None:
    """Four tokens have one, the others their cross entropy, in one pass."""
    hidden, weight, targets, factors = inputs(dtype)
    rows = torch.tensor([1, 3, 8, 12])
    taught = teacher_targets(teacher(dtype, weight), weight.detach())
    soft = taught.at(rows, torch.tensor([2, 0, 1, 3]))
    found = head_loss(hidden, weight, targets, factors, soft=soft)
    (3 * found.loss).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    log_p = (hidden @ weight.T).float().log_softmax(1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    p, q = lumped(log_p[rows], soft.ids), soft.log_q
    divergence = (q.exp() * (q - p)).sum(1)
    each = nll.index_copy(0, rows, divergence)
    (3 * each * factors).sum().backward()
    torch.testing.assert_close(found.nll, nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.divergence, divergence.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.moved, (q.exp() - p.detach().exp()).abs().sum(1) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss, (each * factors).sum(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, (hidden.grad, weight.grad), strict=True):
        assert mine is not None and theirs is not None and mine.dtype == dtype
        assert (mine - theirs).abs().max() <= close * theirs.abs().max()


def test_what_the_head_s_gradient_is_the_product_of_with_a_teacher(blocks: int) -> None:
    hidden, weight, targets, factors = inputs(torch.float32)
    soft = teacher_targets(teacher(torch.float32, weight), weight.detach()).at(torch.arange(4), torch.arange(4))
    head_loss(hidden, weight, targets, factors, soft=soft).loss.backward()
    formed = torch.zeros_like(weight)

    def keep(left: torch.Tensor, right: torch.Tensor, first: int) -> None:
        formed[first : first + left.shape[1]] += left.T @ right

    head_loss(hidden, weight, targets, factors, keep, soft).loss.backward()
    assert weight.grad is not None and torch.equal(formed, weight.grad)


def test_a_teacher_that_agrees_has_nothing_to_teach(blocks: int) -> None:
    hidden, weight, targets, factors = inputs(torch.float32)
    soft = teacher_targets(hidden.detach(), weight.detach())
    found = head_loss(hidden, weight, targets, factors, soft=soft)
    found.loss.backward()
    assert found.moved.max() < 1e-5 and found.divergence.abs().max() < 1e-5
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-5


def test_far_from_the_teacher_gradients_are_finite() -> None:
    """The student is sure of one word, the teacher of none."""
    hidden, weight = torch.zeros(1, 300), torch.eye(300)
    soft = teacher_targets(hidden, weight)
    sure = torch.zeros(1, 300)
    sure[0, soft.ids[0, 0]] = 500.0
    sure.requires_grad_()
    found = head_loss(sure, weight, torch.tensor([7]), torch.ones(1), soft=soft)
    found.loss.backward()
    assert sure.grad is not None and torch.isfinite(sure.grad).all() and 0.9 < found.moved < 1
    others = [word for word in range(300) if word not in soft.ids[0]]
    assert float(sure.grad[0, others].sum()) == pytest.approx(-float(soft.log_q[0, -1].exp()), rel=1e-4)


def test_the_divergence_is_trl_s() -> None:
    """Of TRL 1.16's `trl.experimental.sdft.loss_utils`: add_tail_bucket of the teacher's 64 words, compute_divergence
    with alpha = 0 (KL from the teacher), on these logits in fp64."""
    generator = torch.Generator().manual_seed(7)
    student, taught = (torch.randn(5, 200, generator=generator, dtype=torch.float64).float() * 3 for _ in range(2))
    soft: Soft = teacher_targets(taught, torch.eye(200))
    found = head_loss(student, torch.eye(200), torch.zeros(5, dtype=torch.int64), torch.ones(5), soft=soft)
    trl = [7.890847227252906, 6.229340014747665, 5.870771327183606, 7.707610331592776, 5.675950255490772]
    assert found.divergence.tolist() == pytest.approx(trl, rel=1e-5)


# What follows the product with the head


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(
    "after", [After(0.25), After(1.0, 1.5), After(2.0, 3.0), After(0.5, None, torch.ones(1))], ids=str
)
def test_scale_cap_and_bias_are_torch_s(blocks: int, after: After, taught: bool) -> None:
    hidden, weight, targets, factors = inputs(torch.float32)
    bias = None
    if after.bias is not None:
        bias = torch.randn(WORDS, generator=torch.Generator().manual_seed(3)).requires_grad_()
        after = After(after.scale, after.cap, bias)
    rows = torch.tensor([1, 3, 8, 12])
    soft = teacher_targets(teacher(torch.float32, weight), weight.detach(), after).at(rows, torch.arange(4))
    found = head_loss(hidden, weight, targets, factors, soft=soft if taught else None, after=after)
    found.loss.backward()
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    ours = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    z = (hidden @ weight.T + (0 if bias is None else bias)) * after.scale
    log_p = (z if after.cap is None else after.cap * torch.tanh(z / after.cap)).log_softmax(1)
    each = nll = -log_p.gather(1, targets[:, None])[:, 0]
    if taught:
        q = soft.log_q.detach()
        each = nll.index_copy(0, rows, (q.exp() * (q - lumped(log_p[rows], soft.ids))).sum(1))
    (each * factors).sum().backward()
    torch.testing.assert_close(found.nll, nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, (each * factors).sum(), rtol=1e-4, atol=1e-5)
    for mine, leaf in zip(ours, leaves, strict=True):
        assert mine is not None and leaf.grad is not None
        assert (mine - leaf.grad).abs().max() <= 1e-4 * leaf.grad.abs().max()


def test_a_teacher_is_read_after_scale_and_cap() -> None:
    _, weight, _, _ = inputs(torch.float32)
    hidden, after = teacher(torch.float32, weight), After(0.5, 2.0)
    soft = teacher_targets(hidden, weight.detach(), after)
    log_q = logits_of(hidden, weight.detach(), 0, after).log_softmax(1)
    torch.testing.assert_close(soft.log_q, lumped(log_q, soft.ids), rtol=1e-4, atol=1e-5)
