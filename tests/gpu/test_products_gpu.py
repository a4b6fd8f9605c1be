"""Steps that are decided from products, on CUDA: moments are those of the product in fp32, and nothing else changes.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from test_apollo_gpu import DEVICE, INTERPRETED, pytestmark  # noqa: F401
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, GradientProduct, NonFiniteGradientError
from worker.apollo.products import Part, covers

cuda = pytest.importorskip("worker.apollo.cuda")
launch_tables = pytest.importorskip("worker.apollo.launch_tables")

SHAPES = [(24, 40), (40, 136), (200, 72)] if INTERPRETED else [(600, 5120), (1000, 264), (4104, 1032)]
"""The first is wide, and its R comes in several parts from a gradient."""


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Interpreted, the CUDA implementation has to be asked for, in larger tiles: each costs what it does."""
    if INTERPRETED:
        tiling = launch_tables.Tiling(factor=(16, 128), wide=(16, 16, 512))
        monkeypatch.setattr(
            ApolloMini,
            "_make_backend",
            lambda self, device: cuda.CudaBackend(self._slots, self.area, self._options, tiling),
        )
    yield


def made(tokens: int, seed: int = 0) -> tuple[list[Tensor], list[list[Part]]]:
    """Weights, and of each the factors; the third's come in two parts."""
    torch.manual_seed(seed)
    weights = [torch.randn(shape).mul(0.02).bfloat16().to(DEVICE) for shape in SHAPES]
    parts: list[list[Part]] = []
    for i, (rows, cols) in enumerate(SHAPES):
        cuts = [0, rows // 2 // 8 * 8, rows] if i == 2 else [0, rows]
        right = torch.randn(tokens, cols).bfloat16().to(DEVICE)
        parts.append(
            [
                (torch.randn(tokens, end - first).mul(1e-3).bfloat16().to(DEVICE), right, first)
                for first, end in pairwise(cuts)
            ]
        )
    return weights, parts


def exact(parts: Sequence[Part]) -> Tensor:
    """The gradient in fp32 [rows, cols], summed in fp64."""
    return torch.cat([left.double().t() @ right.double() for left, right, _ in parts]).float()


def given(weights: Sequence[Tensor], parts: Sequence[Sequence[Part]]) -> list[GradientProduct]:
    return [
        GradientProduct(weight, some, exact(some).double().square().sum())
        for weight, some in zip(weights, parts, strict=True)
    ]


def step(
    optimizer: ApolloMini, products: Sequence[GradientProduct], others: Sequence[tuple[Tensor, Tensor]] = ()
) -> None:
    """One whose gradients are formed in bf16, once it was decided."""
    prepared = optimizer.prepare_products(products)
    optimizer.begin()
    optimizer.decide_products(prepared)
    optimizer.write([(one.weight, exact(one.parts).bfloat16()) for one in products])
    optimizer.update_many(others)
    optimizer.finish()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_weights_are_those_of_a_step_from_gradients(rounding: str) -> None:
    """In bf16, but where moments that were not rounded tip a rounding; and so are the step's sizes."""
    ends = {}
    for way in ("products", "gradients"):
        weights, _ = made(1)
        optimizer = ApolloMini(weights, lr=3e-4, weight_decay=0.01, rounding=rounding)
        for seed in range(3):
            _, parts = made(37 if INTERPRETED else 400, seed)
            if way == "products" and seed != 1:  # in between, one that leaves its own sums
                assert all(optimizer.takes_product(w, some) for w, some in zip(weights, parts, strict=True))
                step(optimizer, given(weights, parts))
            else:
                optimizer.step(grads=[exact(some).bfloat16() for some in parts])
        optimizer.check()
        assert optimizer.step_count == 3
        ends[way] = weights, torch.tensor([optimizer.last_update.update_rms, optimizer.last_update.weight_rms])
    for ours, theirs, start in zip(ends["products"][0], ends["gradients"][0], made(1)[0], strict=True):
        assert not torch.equal(ours, start)
        assert float((ours != theirs).float().mean()) < 0.01
    torch.testing.assert_close(ends["products"][1], ends["gradients"][1], rtol=1e-3, atol=0)


def test_moments_are_those_of_the_product_in_fp32() -> None:
    """Which those of a gradient in bf16 are not."""
    weights, parts = made(37)
    twins = [weight.clone() for weight in weights]
    ours, theirs = ApolloMini(weights, lr=1e-3), ApolloMini(twins, lr=1e-3)
    step(ours, given(weights, parts))
    theirs.step(grads=[exact(some) for some in parts])
    rounded = ApolloMini([weight.clone() for weight in weights], lr=1e-3)
    rounded.step(grads=[exact(some).bfloat16() for some in parts])
    for i in range(len(weights)):
        for mine, other, bf16 in zip(*(one.area.moments(i) for one in (ours, theirs, rounded)), strict=True):
            assert float((mine - other).norm() / other.norm()) < 1e-5
            assert float((bf16 - other).norm() / other.norm()) > 1e-4
    torch.testing.assert_close(ours.area.previous, theirs.area.previous, rtol=1e-5, atol=0)


def test_the_rest_of_the_step_comes_after_it() -> None:
    """Another matrix and a vector, formed: each is moved once, as in a step of formed gradients alone."""
    weights, parts = made(37)
    others = [torch.randn(40, 24).bfloat16().to(DEVICE), torch.randn(50).bfloat16().to(DEVICE)]
    gradients = [torch.randn_like(other) for other in others]
    copies = [tensor.clone() for tensor in (*weights, *others)]
    ours = ApolloMini([*weights, *others], lr=1e-3)
    theirs = ApolloMini(copies, lr=1e-3)
    for _ in range(2):
        step(ours, given(weights, parts), list(zip(others, gradients, strict=True)))
        theirs.step(grads=[*(exact(some) for some in parts), *gradients])
    for mine, other in zip(others, copies[len(weights) :], strict=True):
        assert torch.equal(mine, other)
    ours.begin()
    ours.update_many([(others[0], gradients[0])])
    with pytest.raises(ApolloError, match="first part of a step"):
        ours.decide_products(ours.prepare_products(given(weights, parts)))
    ours.abandon()


def test_gradients_that_were_written_are_known_to_the_next_step() -> None:
    """The same tensors again, in a step that is decided from gradients: it is theirs, not the last update's."""
    weights, parts = made(37)
    other, vector = torch.randn(50).bfloat16().to(DEVICE), torch.randn(50).bfloat16().to(DEVICE)
    copies = [tensor.clone() for tensor in (*weights, other)]
    ours, theirs = ApolloMini([*weights, other], lr=1e-3), ApolloMini(copies, lr=1e-3)
    formed = [exact(some).bfloat16() for some in parts]
    for optimizer, tensors in ((ours, [*weights, other]), (theirs, copies)):
        optimizer.begin()
        optimizer.update_many([(tensors[-1], vector)])
        optimizer.finish()
        prepared = optimizer.prepare_products(given(tensors[:-1], parts))
        optimizer.begin()
        optimizer.decide_products(prepared)
        optimizer.write(list(zip(tensors[:-1], formed, strict=True)))
        optimizer.finish()
        optimizer.begin()
        again = formed if optimizer is ours else [gradient.clone() for gradient in formed]
        optimizer.update_many(list(zip(tensors[:-1], again, strict=True)))
        optimizer.finish()
    for mine, twin in zip([*weights, other], copies, strict=True):
        assert torch.equal(mine, twin)


def test_a_matrix_that_was_not_decided_is_not_written() -> None:
    weights, parts = made(37)
    optimizer = ApolloMini(weights, lr=1e-3)
    products = given(weights, parts)
    formed = exact(parts[0]).bfloat16()
    optimizer.begin()
    optimizer.decide_products(optimizer.prepare_products(products[1:]))
    with pytest.raises(ApolloError, match=r"parameter 0 .*decide_products"):
        optimizer.write([(weights[0], formed)])
    optimizer.abandon()
    optimizer.begin()
    with pytest.raises(ApolloError, match=r"parameter 1 .*decide_products"):
        optimizer.write([(weights[1], exact(parts[1]).bfloat16())])  # of the step before
    optimizer.abandon()


def test_a_norm_that_is_not_finite_changes_nothing() -> None:
    weights, parts = made(37)
    optimizer = ApolloMini(weights, lr=1e-3)
    step(optimizer, given(weights, parts))
    optimizer.check()
    before = [weight.clone() for weight in weights], optimizer.area.memory.clone()
    nan = torch.tensor(float("nan"), device=DEVICE)
    step(optimizer, [*given(weights, parts)[:-1], GradientProduct(weights[-1], parts[-1], nan)])
    with pytest.raises(NonFiniteGradientError, match="parameter 2"):
        optimizer.check()
    assert all(torch.equal(now, then) for now, then in zip(weights, before[0], strict=True))
    assert torch.equal(optimizer.area.memory, before[1])


def test_what_is_not_taken() -> None:
    weights, parts = made(37)
    odd = torch.zeros(20, 40, dtype=torch.bfloat16, device=DEVICE)
    wide = torch.zeros(16, 48, dtype=torch.bfloat16, device=DEVICE)
    full = torch.zeros(16, 48, device=DEVICE)
    optimizer = ApolloMini([*weights, odd, wide, full], lr=1e-3)

    def zeros(rows: int, cols: int, first: int = 0, dtype: torch.dtype = torch.bfloat16) -> Part:
        return torch.zeros(8, rows, dtype=dtype, device=DEVICE), torch.zeros(8, cols, dtype=dtype, device=DEVICE), first

    assert optimizer.takes_product(weights[2], parts[2])
    assert not optimizer.takes_product(weights[2], parts[2][:1])  # rows without a gradient
    assert not optimizer.takes_product(weights[2], [*parts[2], parts[2][0]])  # rows with two
    assert not optimizer.takes_product(odd, [zeros(20, 40)])  # rows of factors that do not start at 16 bytes
    assert optimizer.takes_product(wide, [zeros(16, 48)])
    assert not optimizer.takes_product(wide, [zeros(8, 48), zeros(8, 48, 8)])
    assert not optimizer.takes_product(wide, [zeros(16, 48, dtype=torch.float32)])
    assert optimizer.takes_product(full, [zeros(16, 48)])


def test_covers() -> None:
    left = torch.zeros(3, 8)
    assert covers([(left, left, 8), (left, left, 0)], 16)
    assert not covers([(left, left, 0)], 16)
    assert not covers([(left, left, 0), (left, left, 4)], 12)
    assert not covers([(left, left, 8)], 16)
