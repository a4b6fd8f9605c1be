"""What makes a step: burst, streaming and hooks do the same, and a step's scale multiplies it and nothing else.

The checks take a device, as those of apollo_checks.py do.
"""

import math

import torch
from apollo_checks import given_gradients, mixed_weights, run
from torch import Tensor

from worker.apollo import ApolloMini


def check_streaming_is_burst(device: str, dtype: torch.dtype = torch.bfloat16, steps: int = 6, **more) -> None:
    """Whatever the order in which the gradients come, and over a redraw of projections."""
    weights = mixed_weights()
    gradients = [[g.to(dtype) for g in step] for step in given_gradients([tuple(w.shape) for w in weights], steps)]
    options = {"lr": 1e-3, "projection_gap": steps - 2, "weight_decay": 0.01} | more
    burst = run(weights, gradients, device, **options)
    parameters = [torch.nn.Parameter(w.clone().to(device)) for w in weights]
    optimizer = ApolloMini(parameters, **options)
    for t, step in enumerate(gradients):
        optimizer.begin()
        for i in sorted(range(len(weights)), key=lambda i: (i * 7 + t) % 5):
            optimizer.update(parameters[i], step[i].to(device))
        optimizer.finish()
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(burst, parameters, strict=True))


def check_hooks_are_burst(device: str, **options) -> None:
    """`with optimizer.streaming(): loss.backward()` frees every gradient and gives what `step()` gives."""

    def model() -> torch.nn.Module:
        torch.manual_seed(4)
        return torch.nn.Sequential(
            torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8), torch.nn.LayerNorm(8)
        ).to(device, torch.bfloat16)

    one, two = model(), model()
    burst, streamed = (ApolloMini(m.named_parameters(), lr=1e-2, **options) for m in (one, two))
    for seed, bucket_bytes in enumerate([1 << 28, 0, 700]):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        one(x).float().square().sum().backward()
        burst.step()
        burst.zero_grad()
        with streamed.streaming(bucket_bytes):
            two(x).float().square().sum().backward()
        assert all(p.grad is None for p in two.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert burst.step_count == streamed.step_count == 3


def check_step_scale(device: str, most_before: int = 2, **options) -> None:
    """It multiplies the step and nothing else: from weights of zero the step is the weights, and half of it exact.

    most_before: steps at full length that come before it.
    """
    shapes = [(64, 32), (24, 48), (20,), (6, 1, 4)]
    gradients = given_gradients(shapes, 3)

    def taught(*scales: float, front: bool = False) -> tuple[list[Tensor], Tensor, float]:
        """All steps but the last at full length; what the last one moved, the state, and its RMS."""
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        optimizer = ApolloMini(parameters, lr=1e-3, scale_front=front, **options)
        for scale, step in zip(scales, gradients, strict=False):
            with torch.no_grad():
                for parameter in parameters:
                    parameter.zero_()
            optimizer.step(grads=[g.to(device) for g in step], step_scale=scale)
        moved = [p.detach().cpu() for p in parameters]
        return moved, optimizer.area.memory.clone(), optimizer.last_update.update_rms

    for front in (False, True):
        for before in ((1.0,) * count for count in range(most_before + 1)):
            whole, memory, rms = taught(*before, 1.0, front=front)
            half, half_memory, half_rms = taught(*before, 0.5, front=front)
            assert all(w.abs().min() > 0 and torch.equal(h, w / 2) for h, w in zip(half, whole, strict=True))
            assert torch.equal(memory, half_memory), "moments and the limiter see the gradient alone"
            assert math.isclose(half_rms, rms / 2, rel_tol=1e-6)
            tiny, _, tiny_rms = taught(*before, 1e-6, front=front)
            assert all(torch.allclose(t, w * 1e-6, rtol=1e-5, atol=0) for t, w in zip(tiny, whole, strict=True))
            assert math.isclose(tiny_rms, rms * 1e-6, rel_tol=1e-5)
            assert not any(w.any() for w in taught(*before, 0.0, front=front)[0])
        # A short step before does not shorten the next one.
        assert all(torch.equal(a, b) for a, b in zip(taught(1e-6, 1.0)[0], taught(1.0, 1.0)[0], strict=True))


def check_step_scale_in_every_way(device: str, **more) -> None:
    """Burst, streaming and hooks agree bit for bit, weight decay and stochastic rounding included."""

    def model() -> torch.nn.Module:
        torch.manual_seed(4)
        layers = torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8), torch.nn.LayerNorm(8)
        return torch.nn.Sequential(*layers).to(device, torch.bfloat16)

    models = [model() for _ in range(4)]
    options = {"lr": 1e-2, "weight_decay": 0.1} | more
    burst, pieces, hooks, unscaled = (ApolloMini(m.named_parameters(), **options) for m in models)
    for seed, scale in enumerate([0.5, 1.0, 0.125]):
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        for one in (models[0], models[1], models[3]):
            one.zero_grad()
            one(x).float().square().sum().backward()
        burst.step(step_scale=scale)
        pieces.begin(scale)
        for parameter in reversed(list(models[1].parameters())):
            pieces.update(parameter)
        pieces.finish()
        with hooks.streaming(700, step_scale=scale):
            models[2](x).float().square().sum().backward()
        unscaled.step()
    for ours, *others in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours, others[0]) and torch.equal(ours, others[1]) and not torch.equal(ours, others[2])
