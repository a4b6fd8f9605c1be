"""APOLLO-Mini against a float64 transcription of the paper's formulas, and its own promises, on a CPU."""

import math

import pytest
import torch
from apollo_checks import (
    CPU,
    GAP,
    SHAPES,
    STEPS,
    check_adamw,
    check_golden,
    check_nearest_is_the_rounded_fp32_result,
    check_repeatable,
    check_row_slices,
    check_stochastic_takes_a_neighbour_without_bias,
    check_update_rms,
    check_zero_gradient_is_harmless,
    given_gradients,
    given_projection,
    mixed_weights,
    relative,
    run,
    start_weights,
)

from worker.apollo import ApolloError, ApolloMini, NonFiniteGradientError


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_follows_float64_over_redraws(front: bool, decay: float) -> None:
    check_golden(CPU, front, decay)


def test_adamw_follows_float64() -> None:
    check_adamw(CPU)


def test_the_limiter_is_part_of_what_was_compared() -> None:
    """With gamma = inf the result differs, so the golden test would notice a missing limiter."""
    weights, gradients = start_weights(SHAPES), given_gradients(SHAPES, STEPS)
    options = {"lr": 1e-3, "projection_gap": GAP, "projection": given_projection}
    limited = run(weights, gradients, **options)
    free = run(weights, gradients, gamma=math.inf, **options)
    assert all(relative(a, b.double(), w) > 1e-2 for a, b, w in zip(limited, free, weights, strict=True))


def test_auto_scale_is_the_smaller_dimension() -> None:
    weights, gradients = start_weights([(48, 20)]), given_gradients([(48, 20)], 3)
    assert torch.equal(
        run(weights, gradients, lr=1e-3, scale="auto")[0], run(weights, gradients, lr=1e-3, scale=20.0)[0]
    )


def test_a_seed_decides_the_projection() -> None:
    weights, gradients = start_weights([(48, 20)]), given_gradients([(48, 20)], 3)
    first, again, other = (run(weights, gradients, lr=1e-3, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bitwise_repeatable() -> None:
    check_repeatable(CPU)


def test_nearest_is_the_rounded_fp32_result() -> None:
    check_nearest_is_the_rounded_fp32_result(CPU)


def test_stochastic_takes_a_neighbour_without_bias() -> None:
    check_stochastic_takes_a_neighbour_without_bias(CPU)


def test_row_slices() -> None:
    check_row_slices(CPU)


def test_zero_gradient_is_harmless() -> None:
    check_zero_gradient_is_harmless(CPU)


def test_the_limiter_recovers_from_a_vanishing_gradient() -> None:
    """Not quite zero: the floor lets the step come back at once instead of at 1 % a step."""
    weights, gradients = start_weights([(64, 32)]), given_gradients([(64, 32)], 14)
    parameter = torch.nn.Parameter(weights[0].clone())
    optimizer = ApolloMini([parameter], lr=1e-3)
    sizes = []
    for t, step in enumerate(gradients):
        before = parameter.detach().clone()
        optimizer.step(grads=[step[0] * (1e-18 if t == 6 else 1)])
        sizes.append(float((parameter.detach() - before).norm()))
    assert sizes[6] < 1e-6 * sizes[5]
    assert sizes[7] > 5e-4 * sizes[5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing_and_is_named(bad: float) -> None:
    weights, gradients = mixed_weights(), given_gradients([tuple(w.shape) for w in mixed_weights()], 2)
    parameters = [(f"p{i}", torch.nn.Parameter(w.clone())) for i, w in enumerate(weights)]
    optimizer = ApolloMini(parameters, lr=1e-3)
    optimizer.step(grads=gradients[0])
    before, state = [p.detach().clone() for _, p in parameters], optimizer.area.memory.clone()
    gradients[1][2][17] = bad
    with pytest.raises(NonFiniteGradientError, match="p2") as raised:
        optimizer.step(grads=gradients[1])
    assert raised.value.parameter == "p2"
    assert torch.equal(optimizer.area.memory, state)
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, parameters, strict=True))
    gradients[1][2][17] = 0.0
    optimizer.step(grads=gradients[1])
    assert optimizer.step_count == 2


def test_update_rms() -> None:
    check_update_rms(CPU)


def test_what_it_refuses_names_the_parameter() -> None:
    with pytest.raises(ApolloError, match=r"layer\.weight is torch\.float64"):
        ApolloMini([("layer.weight", torch.zeros(2, 2, dtype=torch.float64))], lr=1e-3)
    with pytest.raises(ApolloError, match=r"layer\.weight has strides"):
        ApolloMini([("layer.weight", torch.zeros(4, 3).T)], lr=1e-3)
    optimizer = ApolloMini([("layer.weight", torch.nn.Parameter(torch.zeros(3, 4)))], lr=1e-3)
    with pytest.raises(ApolloError, match=r"the gradient of layer\.weight"):
        optimizer.step(grads=[torch.zeros(4, 3)])
    with pytest.raises(ApolloError, match="later"):
        optimizer.add_param_group({"params": [torch.zeros(2)]})
