"""The loss that is trained is transformers' own, on every architecture; and whatever makes it another is noticed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.model import settle_attention
from worker.model.head_blocks import PLAIN, After
from worker.model.output_head import OutputHead
from worker.shared_weights.bind import build_model
from worker.testing.tiny_architectures import ARCHITECTURES
from worker.trainer.factory import make_trainer
from worker.trainer.proof import (
    LEAST,
    MOST,
    MOST_TEXT,
    ROW,
    ProofError,
    distance,
    expect,
    own_loss,
    proof_row,
    prove_trainer,
)
from worker.trainer.trainer import Trainer

Make = Callable[[str], Path]
MOST_TOKENS = 256


def parts(
    folder: Path, settled: bool = True, change: Callable[[dict[str, torch.Tensor]], None] = lambda t: None
) -> Any:
    """(trainer on the very weights of a model, that model, its tokenizer); change: of the trainer's tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    change(tensors)
    bound = build_model(folder, tensors)
    if settled:
        settle_attention(bound)
    h = Hyperparameters(max_length=MOST_TOKENS, router="trained").settled()
    return make_trainer(bound, list(bound.named_parameters()), tokenizer, h, state=None), model, tokenizer


def gradients(trainer: Trainer, ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = (False, *[True] * (len(ids) - 1))
    trainer.begin([Example("one", (TokenSequence(ids, mask),), 1.0, {})])
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_model_s_own(architecture: Make, name: str) -> None:
    trainer, model, tokenizer = parts(architecture(name))
    expected = prove_trainer(trainer, model, tokenizer, MOST_TOKENS)
    assert len(expected.ids) == min(MOST_TOKENS, ROW + ARCHITECTURES[name].get("sliding_window", 0))
    assert expected.noise > 0 and LEAST <= expected.bound <= MOST
    row = torch.tensor([expected.ids])
    model.set_attn_implementation("eager")
    model(input_ids=row, labels=row, use_cache=False).loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = gradients(trainer, expected.ids)
    assert ours.keys() == theirs.keys()
    for part in ours:
        mine, other = ours[part].float(), theirs[part].float()
        assert (mine - other).norm() <= 0.2 * other.norm() + 1e-6, part  # of several layers' rounding in bf16


@pytest.mark.parametrize("name", ["granite", "gemma2", "cohere2", "phi"])
def test_what_follows_the_head_is_missed(architecture: Make, name: str) -> None:
    trainer, model, tokenizer = parts(architecture(name))
    trainer.head = OutputHead(trainer.head.weight, PLAIN)
    with pytest.raises(ProofError, match=r"is not the loss of this model: .* nats a token, but .* by transformers'"):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


def test_a_window_is_missed(architecture: Make) -> None:
    trainer, model, tokenizer = parts(architecture("mistral"))
    trainer.model.config.sliding_window = None
    with pytest.raises(ProofError):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


def test_a_cap_on_the_scores_is_missed(architecture: Make) -> None:
    trainer, model, tokenizer = parts(architecture("gemma2"), settled=False)
    assert trainer.model.config._attn_implementation == "sdpa"
    with pytest.raises(ProofError):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


def test_two_exchanged_experts_are_noticed(architecture: Make) -> None:
    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
        tensors[name] = tensors[name][[1, 0, 2, 3]]

    trainer, model, tokenizer = parts(architecture("qwen3_moe"), change=exchange)
    with pytest.raises(ProofError):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


def test_weights_without_a_finite_loss_prove_nothing(architecture: Make, caplog: pytest.LogCaptureFixture) -> None:
    """So that a rollback may mend them."""
    trainer, model, tokenizer = parts(architecture("llama"))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    prove_trainer(trainer, model, tokenizer, MOST_TOKENS)
    assert "nothing can be compared" in caplog.text
    assert trainer.begin([Example("one", (TokenSequence((1, 2), (False, True)),), 1.0, {})]).rejected


def test_huge_logits_are_proved_by_what_rounding_does_to_them(architecture: Make) -> None:
    """Weights that training led astray: right they are, and what is wrong is still noticed."""
    trainer, model, tokenizer = parts(architecture("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    assert prove_trainer(trainer, model, tokenizer, MOST_TOKENS).noise > MOST
    trainer.head = OutputHead(trainer.head.weight, After(0.9, None, None))
    with pytest.raises(ProofError):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


def test_the_reference_leaves_its_model_as_it_was(architecture: Make) -> None:
    trainer, _, _ = parts(architecture("llama"))
    trainer.model.train()
    before = own_loss(trainer, (5, 6, 7))
    expect(trainer.model, (5, 6, 7))
    assert trainer.model.training and trainer.model.config._attn_implementation == "sdpa"
    assert torch.equal(own_loss(trainer, (5, 6, 7)), before)


@pytest.mark.parametrize("made, most", [(0, 64), (1, 64), (40, 1), (40, 0)])
def test_a_row_of_no_loss_is_refused_and_sought_no_longer(architecture: Make, made: int, most: int) -> None:
    """A tokenizer that has no token for any of these letters makes none of ever so long a text."""
    config = AutoModelForCausalLM.from_pretrained(architecture("llama")).config

    def tokenizer(text: str) -> dict[str, list[int]]:
        assert len(text) < 10 * MOST_TEXT
        return {"input_ids": [1] * made}

    with pytest.raises(ProofError, match="nothing can be proved"):
        proof_row(tokenizer, config, most)


def test_distance_is_that_of_the_worst_stretch() -> None:
    one = torch.zeros(64)
    other = one.clone()
    other[16:32] = 0.5
    assert distance(one, other) == 0.5
    assert distance(one, other.index_fill(0, torch.tensor([3]), torch.nan)) == torch.inf
