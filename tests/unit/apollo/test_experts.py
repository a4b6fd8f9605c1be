"""A stack of matrices [E, rows, cols] is E matrices, each with its own step count, moments, limiter and random draws.

The checks take a device, so that test_experts_gpu.py runs the same ones on CUDA.
"""

import pytest
import torch
from apollo_checks import given_gradients, start_weights
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, NonFiniteGradientError, state_bytes
from worker.apollo.parameters import EXPERTS_FROM
from worker.apollo.state_layout import Layout, StateArea, is_unstacked, matrices_of

CPU = "cpu"
RULES = pytest.mark.parametrize("rule", ["apollo", "factored"])
WIDE, TALL = (3, 24, 40), (3, 40, 24)
SHAPES = [WIDE, (33, 16), TALL]
"""Two stacks and a matrix; sorted names give them the ids 0, 1, 2."""
OPTIONS = {"lr": 1e-2, "projection_gap": 3, "seed": 5, "weight_decay": 0.1}
STEPS = 6


def parameters(device: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    """The first stack lies in a larger tensor: its rows are contiguous, its matrices are not."""
    made = []
    for i, weight in enumerate(start_weights(SHAPES)):
        weight = weight.to(device, dtype)
        if i == 0:
            room = torch.zeros(3, 32, 40, dtype=dtype, device=device)
            room[:, :24] = weight
            weight = room[:, :24]
        made.append(torch.nn.Parameter(weight))
    return made


def gradients(device: str, seed: int = 0) -> list[list[Tensor]]:
    return [[g.to(device) for g in step] for step in given_gradients(SHAPES, STEPS, seed)]


def apart(stacks: list[torch.nn.Parameter]) -> tuple[list[torch.nn.Parameter], list[int]]:
    """Every matrix as a parameter of its own, and the ids that draw for it as for the stack's."""
    found, ids = [], []
    for i, parameter in enumerate(stacks):
        whole = parameter.detach()
        pieces = list(whole) if whole.dim() == 3 else [whole]
        found += [torch.nn.Parameter(piece.clone()) for piece in pieces]
        ids += [i + e * EXPERTS_FROM for e in range(len(pieces))]
    return found, ids


def pieces_of(step: list[Tensor]) -> list[Tensor]:
    return [piece for g in step for piece in (g if g.dim() == 3 else [g])]


def check_experts_are_matrices(device: str, rule: str) -> None:
    stacks = parameters(device)
    others, ids = apart(stacks)
    ours = ApolloMini(stacks, matrices=rule, **OPTIONS)
    theirs = ApolloMini([{"params": others, "ids": ids}], matrices=rule, **OPTIONS)
    for step in gradients(device):
        ours.step(grads=step)
        theirs.step(grads=pieces_of(step))
    assert all(torch.equal(a, b) for a, b in zip(pieces_of([p.detach() for p in stacks]), others, strict=True))
    assert ours.last_update.update_rms == pytest.approx(theirs.last_update.update_rms)


def touched(t: int) -> list[bool]:
    """Which matrices of each stack have a gradient in step `t`: one always, one from the fourth on, one seldom."""
    return [True, t >= 3, t % 2 == 1]


def sparse(device: str) -> list[list[Tensor]]:
    found = gradients(device)
    for t, step in enumerate(found):
        for g in step:
            if g.dim() == 3:
                g[[not there for there in touched(t)]] = 0
    return found


def check_each_counts_its_own_steps(device: str, rule: str) -> None:
    """As an optimizer of its own would, that takes a step only where there is a gradient. fp32: without random bits,
    which are the whole step's."""
    options = OPTIONS | {"projection_gap": 1000}
    stacks = parameters(device, torch.float32)
    others, ids = apart(stacks)
    ours = ApolloMini(stacks, matrices=rule, **options)
    single = [ApolloMini([{"params": [p], "ids": [id]}], matrices=rule, **options)
              for p, id in zip(others, ids, strict=True)]  # fmt: skip
    for step in sparse(device):
        ours.step(grads=step)
        for one, g in zip(single, pieces_of(step), strict=True):
            if g.any():
                one.step(grads=[g])
    assert [one.step_count for one in single] == [6, 3, 3, 6, 6, 3, 3] and ours.step_count == 6
    assert all(torch.equal(a, b) for a, b in zip(pieces_of([p.detach() for p in stacks]), others, strict=True))


def check_untouched_stays(device: str, rule: str) -> None:
    """Bit for bit: weights, whatever the decay, and all of its state."""
    stacks = parameters(device)
    optimizer = ApolloMini(stacks, matrices=rule, **OPTIONS)
    steps = gradients(device)
    optimizer.step(grads=steps[0])

    def known(expert: int) -> list[Tensor]:
        """Of the first stack, whose matrices are the first entries of the area."""
        area = optimizer.area
        parts = [stacks[0].detach()[expert], *area.moments(expert), area.previous[expert], area.taken(expert)]
        return [part.clone() for part in parts]

    before = [known(e) for e in range(3)]
    for step in steps[1:]:
        step[0][1] = 0
        optimizer.step(grads=step)
    after = [known(e) for e in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert [int(one[-1]) for one in after] == [STEPS, 1, STEPS] and optimizer.step_count == STEPS
    assert not any(torch.equal(before[e][0], after[e][0]) for e in (0, 2))


def check_streaming_is_burst(device: str, rule: str) -> None:
    at_once, one_by_one = parameters(device), parameters(device)
    burst, streaming = (ApolloMini(some, matrices=rule, **OPTIONS) for some in (at_once, one_by_one))
    for step in sparse(device):
        burst.step(grads=step)
        streaming.begin()
        for i in (2, 0, 1):
            streaming.update(one_by_one[i], step[i])
        streaming.finish()
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    assert torch.equal(burst.state_dict()["state"]["area"], streaming.state_dict()["state"]["area"])


def check_resumes(device: str, rule: str) -> None:
    """In the same memory, and from `state_dict`."""
    memory = torch.zeros(state_bytes(SHAPES, matrices=rule), dtype=torch.uint8, device=device)
    stacks, unbroken = parameters(device), parameters(device)
    whole = ApolloMini(unbroken, matrices=rule, **OPTIONS)
    for t, step in enumerate(sparse(device)):
        if t in (0, 4):
            optimizer = ApolloMini(stacks, matrices=rule, state=memory, **OPTIONS)
        if t == 2:
            saved = optimizer.state_dict()
            optimizer = ApolloMini(stacks, matrices=rule, lr=0.5, state=memory)
            optimizer.load_state_dict(saved)
        optimizer.step(grads=step)
        whole.step(grads=step)
    assert all(torch.equal(a, b) for a, b in zip(stacks, unbroken, strict=True))


def check_a_non_finite_gradient_names_the_expert(device: str) -> None:
    names = ("experts", "linear", "zexperts")
    stacks = parameters(device)
    optimizer = ApolloMini(list(zip(names, stacks, strict=True)), **OPTIONS)
    before = [p.detach().clone() for p in stacks]
    bad = gradients(device)[0]
    bad[0][2, 3, 3] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"experts\[2\]"):
        optimizer.step(grads=bad)
        optimizer.check()
    assert all(torch.equal(a, b) for a, b in zip(stacks, before, strict=True)) and optimizer.step_count == 0
    assert optimizer.name_of(stacks[0]) == "experts" and optimizer.name_of(stacks[1]) == "linear"
    assert {id(p) for p in optimizer.sweep_order()} == {id(p) for p in stacks} and len(optimizer.sweep_order()) == 3


@RULES
def test_experts_are_matrices(rule: str) -> None:
    check_experts_are_matrices(CPU, rule)


@RULES
def test_each_counts_its_own_steps(rule: str) -> None:
    check_each_counts_its_own_steps(CPU, rule)


@RULES
def test_an_expert_without_tokens_stays_as_it_is(rule: str) -> None:
    check_untouched_stays(CPU, rule)


@RULES
def test_streaming_is_burst(rule: str) -> None:
    check_streaming_is_burst(CPU, rule)


@RULES
def test_resumes(rule: str) -> None:
    check_resumes(CPU, rule)


def test_a_non_finite_gradient_names_the_expert() -> None:
    check_a_non_finite_gradient_names_the_expert(CPU)


@RULES
def test_compiled_and_torch_s_sweep_agree(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parameters(CPU)
    first = ApolloMini(plain, matrices=rule, **OPTIONS)
    monkeypatch.setattr("worker.apollo.cpu.COMPILED_FROM", 0)
    compiled = parameters(CPU)
    second = ApolloMini(compiled, matrices=rule, **OPTIONS)
    assert second._steps.backend._kernel is not None
    for step in sparse(CPU):
        first.step(grads=step)
        second.step(grads=step)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_the_state_is_a_matrix_s_an_expert() -> None:
    one, two, three = (state_bytes([(e, 512, 2048)]) for e in (1, 2, 3))
    assert 2 * two == one + three + 64 or two - one == three - two == 2 * 4 * 2048  # beside a header's rounding
    assert state_bytes([(256, 512, 2048)]) < 256 * 2 * 4 * 2048 + 4096
    assert state_bytes([(256, 512, 2048)], matrices="factored") < 256 * 4 * (512 + 2048) + 4096
    for shape in [(6, 1, 4), (6,), (2, 3, 4, 5)]:  # a depthwise convolution, a vector, what is no stack: AdamW's
        assert state_bytes([shape]) == state_bytes([shape], ["adamw"])


def test_layouts_without_a_stack_are_as_they_were() -> None:
    """Bytes and digest of 2026's first release: an area of a dense model is found again."""
    layout = Layout.of([(8, 4), (3,), (6, 1, 4)])
    assert (layout.offsets, layout.total) == ((128, 256, 384), 640)
    assert layout.digest.hex().startswith(DENSE_DIGEST)


DENSE_DIGEST = "6c9791b5d12a4782"


def test_an_older_layout_is_known_and_refused() -> None:
    old = Layout.of(SHAPES, ["adamw", "apollo", "adamw"])
    memory = torch.zeros(old.total, dtype=torch.uint8)
    StateArea(memory, old)
    assert is_unstacked(memory, SHAPES) and matrices_of(memory, SHAPES) is None
    with pytest.raises(ApolloError, match="belongs to other parameters"):
        ApolloMini(parameters(CPU), state=memory, **OPTIONS)
    ours = torch.zeros(state_bytes(SHAPES), dtype=torch.uint8)
    ApolloMini(parameters(CPU), state=ours, **OPTIONS)
    assert not is_unstacked(ours, SHAPES) and matrices_of(ours, SHAPES) == "apollo"


def test_too_many_are_an_error() -> None:
    tensor = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(ApolloError, match="both are below 65536"):
        ApolloMini([{"params": [tensor], "ids": [EXPERTS_FROM]}], lr=1e-3)
