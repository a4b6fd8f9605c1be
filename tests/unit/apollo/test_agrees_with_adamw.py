"""Where APOLLO-Mini's step is AdamW's by algebra, the optimizer and torch's own AdamW give the same weights.

Let every gradient be G_t = c_t S with one pattern of signs S (elements +1 and -1) and c_t > 0. AdamW's step is then
S m_t / (sqrt(v_t) + eps) with the scalar m_t, v_t of the c_t. APOLLO-Mini with P = sqrt(min(rows, cols)) e_1, which
sees one channel and has a normal draw's length, has R = c_t sqrt(min) S_1, so N = S_1 m_t / sqrt(v_t), s = ||N|| /
||R|| = m_t / (sqrt(v_t) c_t sqrt(min)), and with scale "auto" U = sqrt(min) s G = S m_t / sqrt(v_t): the same, at
every step, for any shape. The limiter, which AdamW has not, is off.
"""

import math

import pytest
import torch
from torch import Tensor

from worker.apollo import ApolloMini

STEPS = 12
LR = 1e-2


def first_channel(index: int, shape: tuple[int, int], draw: int) -> Tensor:
    """P = sqrt(min(rows, cols)) e_1."""
    projection = torch.zeros(shape)
    projection.view(-1)[0] = math.sqrt(projection.numel())
    return projection


def signs_and_sizes(shape: tuple[int, ...]) -> list[Tensor]:
    """G_t = c_t S: fp32 [STEPS] of `shape`; c_t goes up and down by a factor of ten."""
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    return [signs * 10 ** math.sin(t) for t in range(STEPS)]


def taught(optimizer_of, gradients: list[Tensor]) -> Tensor:
    """What the steps have moved a weight that began as zeros."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = optimizer_of([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 4), (4, 6), (40, 130)])
def test_a_matrix_whose_elements_share_one_history_moves_as_with_adamw(shape: tuple[int, int]) -> None:
    gradients = signs_and_sizes(shape)
    ours = taught(lambda p: ApolloMini(p, lr=LR, gamma=math.inf, projection=first_channel), gradients)
    assert error(ours, taught(adamw, gradients)) < 2e-6


def test_the_agreement_is_of_these_gradients_alone() -> None:
    """Elements of different sizes: one scale a matrix keeps their ratio and AdamW does not."""
    gradients = [g * torch.linspace(0.1, 1.0, 24).view(6, 4) for g in signs_and_sizes((6, 4))]
    ours = taught(lambda p: ApolloMini(p, lr=LR, gamma=math.inf, projection=first_channel), gradients)
    assert error(ours, taught(adamw, gradients)) > 0.1


@pytest.mark.parametrize("shape", [(17,), (5, 1, 4)])
def test_what_is_no_matrix_moves_as_with_adamw_whatever_its_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    assert error(taught(lambda p: ApolloMini(p, lr=LR), gradients), taught(adamw, gradients)) < 2e-6
