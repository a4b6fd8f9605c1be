"""A stack's matrices in the CUDA implementation: the CPU's checks again.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do.
"""

import pytest
import test_experts as experts
from test_apollo_gpu import DEVICE, device_only, kernels_everywhere, pytestmark  # noqa: F401


@device_only
@experts.RULES
def test_experts_are_matrices(rule: str) -> None:
    experts.check_experts_are_matrices(DEVICE, rule)


@pytest.mark.parametrize("rule", ["apollo", pytest.param("factored", marks=device_only)])  # a minute, interpreted
def test_each_counts_its_own_steps(rule: str) -> None:
    experts.check_each_counts_its_own_steps(DEVICE, rule)


@device_only
@experts.RULES
def test_an_expert_without_tokens_stays_as_it_is(rule: str) -> None:
    experts.check_untouched_stays(DEVICE, rule)


@device_only
@experts.RULES
def test_streaming_is_burst(rule: str) -> None:
    experts.check_streaming_is_burst(DEVICE, rule)


@device_only
@experts.RULES
def test_resumes(rule: str) -> None:
    experts.check_resumes(DEVICE, rule)


def test_a_non_finite_gradient_names_the_expert() -> None:
    experts.check_a_non_finite_gradient_names_the_expert(DEVICE)
