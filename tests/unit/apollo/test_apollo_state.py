"""The state area: in memory that outlives the optimizer, saved and restored exactly, and refused when it is not
ours."""

from pathlib import Path

import pytest
import torch
from apollo_checks import given_gradients, mixed_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.apollo import ApolloError, ApolloMini, state_bytes

SHAPES = [tuple(w.shape) for w in mixed_weights()]
GAP, STEPS, STOP = 4, 11, 6
OPTIONS = {"lr": 1e-3, "projection_gap": GAP, "seed": 9}


def gradients(device: str) -> list[list[Tensor]]:
    return [[g.to(device) for g in step] for step in given_gradients(SHAPES, STEPS)]


def unbroken(device: str, **rule) -> list[Tensor]:
    parameters = [torch.nn.Parameter(w.to(device)) for w in mixed_weights()]
    optimizer = ApolloMini(parameters, **OPTIONS, **rule)
    for step in gradients(device):
        optimizer.step(grads=step)
    return parameters


def check_resumes_in_place(device: str, **rule) -> None:
    """A second optimizer over the same weights and the same memory goes on as if it were the first, past a redraw."""
    memory = torch.zeros(state_bytes(SHAPES, **rule), dtype=torch.uint8, device=device)
    parameters = [torch.nn.Parameter(w.to(device)) for w in mixed_weights()]
    for first, last in ((0, STOP), (STOP, STEPS)):
        optimizer = ApolloMini(parameters, state=memory, **OPTIONS, **rule)
        assert optimizer.step_count == first
        for step in gradients(device)[first:last]:
            optimizer.step(grads=step)
        del optimizer
    assert all(torch.equal(a, b) for a, b in zip(parameters, unbroken(device, **rule), strict=True))


def check_resumes_from_a_file(device: str, folder: Path, **rule) -> None:
    """state_dict through torch.load(weights_only=True), and the area alone through safetensors."""
    parameters = [torch.nn.Parameter(w.to(device)) for w in mixed_weights()]
    optimizer = ApolloMini(parameters, **OPTIONS, **rule)
    for step in gradients(device)[:STOP]:
        optimizer.step(grads=step)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    save_file({"area": optimizer.state_dict()["state"]["area"]}, folder / "optimizer.safetensors")
    kept = [p.detach().clone() for p in parameters]

    other = ApolloMini([torch.nn.Parameter(p.clone()) for p in kept], lr=0.5, **rule)
    other.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    area = load_file(folder / "optimizer.safetensors")["area"].to(device)
    third = ApolloMini([torch.nn.Parameter(p.clone()) for p in kept], state=area, **OPTIONS, **rule)
    for resumed in (other, third):
        for step in gradients(device)[STOP:]:
            resumed.step(grads=step)
        mine = resumed.param_groups[0]["params"]
        assert all(torch.equal(a, b) for a, b in zip(mine, unbroken(device, **rule), strict=True))


def test_resumes_in_place() -> None:
    check_resumes_in_place("cpu")


def test_resumes_from_a_file(tmp_path: Path) -> None:
    check_resumes_from_a_file("cpu", tmp_path)


def test_size_is_the_sum_of_its_parts() -> None:
    assert state_bytes([(17408, 5120)]) - state_bytes([(5120, 5120)]) == 2 * 4 * (17408 - 5120)
    assert state_bytes([(128, 64)], ["adamw"]) - state_bytes([(128, 64)]) == 2 * 4 * (128 * 64 - 128)
    assert state_bytes([(5,)]) == 128 + 2 * 64


def test_a_layout_that_does_not_fit_is_an_error() -> None:
    memory = torch.zeros(state_bytes([(8, 4), (3,)]), dtype=torch.uint8)
    tensors = {shape: torch.nn.Parameter(torch.zeros(shape)) for shape in [(8, 4), (3,), (4, 8), (3, 4)]}
    ApolloMini([tensors[8, 4], tensors[3,]], lr=1e-3, state=memory)
    ApolloMini([tensors[8, 4], tensors[3,]], lr=1e-3, state=memory)  # the same again is welcome
    for others in ([tensors[4, 8], tensors[3,]], [tensors[3,], tensors[8, 4]], [tensors[8, 4]]):
        with pytest.raises(ApolloError, match="belongs to other parameters"):
            ApolloMini(others, lr=1e-3, state=memory)
    with pytest.raises(ApolloError, match="belongs to other parameters"):
        ApolloMini([{"params": [tensors[8, 4]], "algorithm": "adamw"}], lr=1e-3, state=torch.cat([memory, memory]))
    with pytest.raises(ApolloError, match=r"has 100 bytes .*state_bytes"):
        ApolloMini([tensors[8, 4]], lr=1e-3, state=memory[:100])
    garbage = torch.full_like(memory, 3)
    with pytest.raises(ApolloError, match="belongs to other parameters"):
        ApolloMini([tensors[8, 4], tensors[3,]], lr=1e-3, state=garbage)


def test_everything_that_persists_is_in_the_memory_handed_in() -> None:
    """Copy the bytes and the weights at any step: that is a complete checkpoint."""
    memory = torch.zeros(state_bytes(SHAPES), dtype=torch.uint8)
    parameters = [torch.nn.Parameter(w) for w in mixed_weights()]
    optimizer = ApolloMini(parameters, state=memory, **OPTIONS)
    optimizer.step(grads=gradients("cpu")[0])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    twin = ApolloMini(copies, state=memory.clone(), **OPTIONS)
    for o in (optimizer, twin):
        o.step(grads=gradients("cpu")[1])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
