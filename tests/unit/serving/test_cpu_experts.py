"""Experts computed from weights as they are, against a plain sum over tokens and experts; and none that may be
packed."""

import pytest
import torch

from worker.serving.vllm import cpu_backend, cpu_experts
from worker.serving.vllm.private_api import VllmChangedError

TOKENS, WIDTH, INNER, EXPERTS = 7, 16, 8, 5


@pytest.mark.parametrize("act", cpu_experts.ACTIVATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sum_over_experts_is_the_plain_one(act: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    w13 = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=generator)
    w2 = torch.randn(EXPERTS, WIDTH, INNER, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)])  # one has no token
    weights = torch.rand(TOKENS, 2, generator=generator)
    w13[EXPERTS - 1] = w2[EXPERTS - 1] = torch.nan  # and is not read
    out = torch.empty_like(x)
    cpu_experts.run(out, x, w13, w2, None, None, weights, ids.int(), act, "vec", weighted)
    expected = torch.zeros_like(x)
    for token in range(TOKENS):
        for place in range(2):
            gate, up = (w13[ids[token, place]] @ x[token]).chunk(2)
            made = w2[ids[token, place]] @ (cpu_experts.ACTIVATIONS[act](gate) * up)
            expected[token] += made if weighted else weights[token, place] * made
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_know_is_refused() -> None:
    x, some = torch.zeros(1, 4), torch.zeros(1)
    for bias, act in ((some, "silu"), (None, "swigluoai")):
        with pytest.raises(ValueError, match="without biases and by silu, gelu, gelu_tanh alone"):
            cpu_experts.run(x, x, some, some, bias, None, some, some, act, "vec")


def test_experts_that_may_be_packed_are_refused_by_name() -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.w13_weight = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(VllmChangedError, match=r"experts\.w13_weight may be packed"):
        cpu_backend.verify_unpacked(model)
    left = cpu_backend._leave_experts(model.experts.w13_weight, "vec")
    assert left is model.experts.w13_weight
    cpu_backend.verify_unpacked(model)
