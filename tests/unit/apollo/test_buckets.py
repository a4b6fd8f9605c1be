"""Gradients that go on changing after they were made: a bucket of them is applied when the next one has come."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from worker.apollo import ApolloMini
from worker.apollo.gradient_hooks import Pairs

LAYERS = 4


def model() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(LAYERS)))


def step(before: Callable[[Pairs], Callable[[], None] | None]) -> list[Tensor]:
    """The weights after one step, each layer's gradient in a bucket of its own."""
    some = model()
    optimizer = ApolloMini(list(some.parameters()), lr=1e-2)
    with optimizer.streaming(0, before=before):
        some(torch.ones(5, 8)).square().sum().backward()
    return [parameter.detach() for parameter in some.parameters()]


def doubled(pairs: Pairs) -> None:
    for _, gradient in pairs:
        gradient *= 2


@pytest.mark.parametrize("told", [2, LAYERS])
def test_a_bucket_is_used_when_it_is_ready_and_one_behind(told: int) -> None:
    """Of the first `told` buckets it is said that they still change; what is told of the others changed at once."""
    log: list[str] = []

    def before(pairs: Pairs) -> Callable[[], None] | None:
        number = len([line for line in log if line.startswith("given")])
        log.append(f"given {number}")
        if number >= told:
            doubled(pairs)
            return None
        kept = list(pairs)

        def ready() -> None:
            log.append(f"ready {number}")
            doubled(kept)

        return ready

    assert all(torch.equal(a, b) for a, b in zip(step(before), step(doubled), strict=True))
    order = [
        line
        for n in range(LAYERS)
        for line in (f"given {n}", f"ready {n - 1}")
        if line.endswith(str(n)) or 0 < n <= told
    ]
    assert log == order + ([f"ready {LAYERS - 1}"] if told == LAYERS else [])


def test_a_step_that_fails_uses_nothing_that_waits() -> None:
    class Lost(Exception):
        pass

    def ready() -> None:
        raise Lost

    some = model()
    optimizer = ApolloMini(list(some.parameters()), lr=1e-2)
    with pytest.raises(Lost), optimizer.streaming(0, before=lambda pairs: ready):
        some(torch.ones(5, 8)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(some.parameters(), model().parameters(), strict=True))
    optimizer.step(grads=[torch.ones(8, 8)] * LAYERS)  # it is closed: the next one may begin
