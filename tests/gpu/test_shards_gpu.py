"""Matrices that are divided over processes, on the CUDA implementation: test_shards.py's checks again.

With TRITON_INTERPRET=1 they run on the CPU, as test_apollo_gpu.py's do. The two ranks are threads of one process, and
only one of them runs at a time: Triton's interpreter is not for threads.
"""

import math

import pytest
import test_shards as shards
import torch
from test_apollo_gpu import DEVICE, INTERPRETED, kernels_everywhere, pytestmark  # noqa: F401

from worker.apollo import ApolloMini, NonFiniteGradientError
from worker.utils.shard import assemble


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "STEPS", 2 if INTERPRETED else 6)
    monkeypatch.setattr(shards, "DEVICE", DEVICE)


@pytest.mark.parametrize("streaming", [False, True])
def test_bf16_weights_are_the_whole_s(streaming: bool) -> None:
    shards.check_bf16(streaming)


def test_what_ranks_hold_in_full_stays_equal_bit_for_bit() -> None:
    shards.test_what_ranks_hold_in_full_stays_equal_bit_for_bit()


def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_on_all() -> None:
    def run(rank: int, sums: shards.Sums) -> tuple[str, bool]:
        weights = shards.cut(shards.values(torch.bfloat16), rank)
        before = {name: tensor.clone() for name, tensor in weights.items()}
        given = shards.cut(shards.gradients(0, torch.bfloat16), rank)
        if rank == 1:
            given["down"][0, 0] = math.nan
        group = {"params": list(weights.items()), "shards": [shards.parts(name, rank) for name in weights]}
        optimizer = ApolloMini([group], lr=0.01, sum_over_shards=sums.of(rank))
        optimizer.step(grads=list(given.values()))
        with pytest.raises(NonFiniteGradientError) as error:
            optimizer.check()
        return str(error.value), all(torch.equal(weights[name], before[name]) for name in weights)

    said = shards.on_ranks(run)
    assert all("down" in message and untouched for message, untouched in said) and said[0] == said[1]


def test_it_is_the_cpu_s_step() -> None:
    """fp32, up to the order of sums."""
    whole = {name: tensor.cpu() for name, tensor in shards.values(torch.float32).items()}
    options = {"lr": 0.01, "seed": 3, "weight_decay": 0.1, "projection_gap": 4}
    from worker.apollo.cpu import CpuBackend

    class OnCpu(ApolloMini):
        def _make_backend(self, device: torch.device) -> CpuBackend:
            return CpuBackend(self._slots, self.area, self._options)

    optimizer = OnCpu(list(whole.items()), **options)
    for step in range(shards.STEPS):
        given = shards.gradients(step, torch.float32)
        optimizer.step(grads=[given[name].cpu() for name in whole], step_scale=0.5)
    results = shards.on_ranks(lambda rank, sums: shards.divided(rank, sums, torch.float32, False))
    for name, expected in whole.items():
        held = [(weights[name], shards.parts(name, rank)) for rank, (weights, _) in enumerate(results)]
        torch.testing.assert_close(assemble(held).cpu(), expected, rtol=1e-5, atol=1e-6)
