"""Burst, streaming and hooks make the same step, and its scale multiplies it and nothing else, on a CPU."""

import math

import pytest
import torch
from apollo_checks import CPU
from step_checks import check_hooks_are_burst, check_step_scale, check_step_scale_in_every_way, check_streaming_is_burst

from worker.apollo import ApolloError, ApolloMini


def test_streaming_is_burst() -> None:
    check_streaming_is_burst(CPU)


def test_hooks_are_burst() -> None:
    check_hooks_are_burst(CPU)


def test_step_scale() -> None:
    check_step_scale(CPU)


def test_step_scale_in_every_way() -> None:
    check_step_scale_in_every_way(CPU)


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_a_step_scale_that_makes_no_sense_is_refused_before_anything_changes(scale: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = ApolloMini([("w", parameter)], lr=1e-3)
    before = optimizer.area.memory.clone()
    with pytest.raises(ApolloError, match="step_scale"):
        optimizer.step(grads=[torch.ones(8, 8)], step_scale=scale)
    with pytest.raises(ApolloError, match="step_scale"), optimizer.streaming(step_scale=scale):
        raise AssertionError("the block must not be entered")
    assert torch.equal(parameter.detach(), torch.ones(8, 8)) and torch.equal(before, optimizer.area.memory)
    optimizer.step(grads=[torch.ones(8, 8)])
    assert optimizer.step_count == 1
