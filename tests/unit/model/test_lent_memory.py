"""Inputs of layers stand in lent memory, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from worker.model.gradient_factors import factors_of
from worker.model.layers import recompute
from worker.model.lent_memory import ALIGNED, LentMemory, LentMemoryError, lend

IDS = torch.arange(48)[None] % 60
ROOM = 1 << 20


@pytest.fixture
def model(tiny_model: Path) -> Any:
    made = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    recompute(made, lambda tokens: 0)
    return made


def gradients(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("room", [ROOM, 40_000, 0])
def test_gradients_have_the_same_bits_wherever_inputs_stand(model: Any, room: int) -> None:
    plain = gradients(model)
    region = torch.full((room + ALIGNED,), 255, dtype=torch.uint8)[ALIGNED:]
    lent = lend(model, region)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))
        assert not lent.is_used
    size = IDS.numel() * model.config.get_text_config().hidden_size * 4
    layers = model.config.get_text_config().num_hidden_layers
    assert bool((region != 255).any()) == (room >= size), "as many as fit"
    assert int((region != 255).sum()) <= min(layers, room // size) * size


def test_it_is_used_from_a_pass_until_its_backward(model: Any) -> None:
    lent = lend(model, torch.zeros(ROOM, dtype=torch.uint8))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert not lent.is_used, "nothing is kept for a backward pass"
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert lent.is_used
    loss.backward()
    assert not lent.is_used


def test_a_pass_that_begins_before_the_others_backward_takes_nothing_of_it(model: Any) -> None:
    plain = gradients(model)
    other = IDS.flip(1)
    expected = [a + b for a, b in zip(plain, gradients(model, other), strict=True)]
    lend(model, torch.zeros(ROOM, dtype=torch.uint8))
    model.zero_grad()
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (IDS, other)]
    losses[0].backward()
    losses[1].backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(expected, found, strict=True))


def test_nothing_stands_there_while_factors_are_recorded(model: Any) -> None:
    """They are read after the backward pass, when nobody would know that they are."""
    region = torch.zeros(ROOM, dtype=torch.uint8)
    lend(model, region)
    factors = factors_of(model)
    with factors.recording():
        factors.begin_pass()
        gradients(model)
    assert not region.any() and list(factors.products())
    factors.forget()
    gradients(model)
    assert region.any()


def test_what_does_not_fit_or_is_not_contiguous_stays() -> None:
    lent = LentMemory(torch.zeros(900, dtype=torch.uint8))
    x = torch.randn(1, 10, 10)
    assert lent.moved(x) is not x
    assert lent.moved(x) is x, "512 of 900 bytes are taken"
    across = x.mT
    assert LentMemory(torch.zeros(900, dtype=torch.uint8)).moved(across) is across


@pytest.mark.parametrize("when", ["before backward", "after it", "never"])
def test_watched_it_is_seen_that_an_input_was_written_over(model: Any, when: str) -> None:
    region = torch.zeros(ROOM, dtype=torch.uint8)
    lent = lend(model, region)

    def passes() -> None:
        with lent.watched():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            if when == "before backward":
                region[100] += 1
            loss.backward()
            if when == "after it":
                region[100] += 1

    if when == "never":
        passes()
    else:
        with pytest.raises(LentMemoryError, match="--graphs off"):
            passes()
    assert not lent.is_used
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    region[100] += 1
    loss.backward()  # nobody watches
