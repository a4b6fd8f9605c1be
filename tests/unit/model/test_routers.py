"""The router of a mixture is found by what transformers declares of it, and is frozen unless it is asked to learn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from worker.checkpoint.replay import hyperparameters, plain_hyperparameters
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.model import ModelError, freeze_routers
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

Make = Callable[[str], Path]
MIXTURES = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next"]
GATES = {
    "mixtral": "mlp.gate.weight", "olmoe": "mlp.gate.weight", "glm4_moe": "mlp.gate.weight",
    "deepseek_v3": "mlp.gate.weight", "gpt_oss": "mlp.router.bias mlp.router.weight", "llama4_text":
    "feed_forward.router.weight",
}  # fmt: skip


def trainer_of(folder: Path, **chosen: Any) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    h = Hyperparameters(lr=1e-2, **chosen).settled()
    return make_trainer(model, model.named_parameters(), AutoTokenizer.from_pretrained(folder), h, state=None)


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights as they were, after a step that shows itself in all that learns."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    ids = tuple(range(5, 12))
    trainer.begin([Example("one", (TokenSequence(ids, (False, *[True] * 6)),), 1.0, {})])
    trainer.apply()
    return before


@pytest.mark.parametrize("name", MIXTURES)
def test_a_frozen_router_keeps_its_bits_and_all_else_learns(architecture: Make, name: str) -> None:
    trainer = trainer_of(architecture(name))
    before = trained(trainer)
    same = {key for key, p in trainer.model.named_parameters() if torch.equal(p, before[key])}
    layers = trainer.model.config.num_hidden_layers
    assert same == {f"model.layers.{i}.mlp.gate.weight" for i in range(layers)}
    assert name == "qwen3_moe" or any("shared_expert_gate" in key for key in before.keys() - same)


def test_a_router_may_learn(architecture: Make) -> None:
    trainer = trainer_of(architecture("qwen3_moe"), router="trained")
    before = trained(trainer)
    assert not any(torch.equal(p, before[key]) for key, p in trainer.model.named_parameters())


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_without_tokens_keep_their_bits(architecture: Make, name: str) -> None:
    """Two of four experts a token, and a router that sends every token to the same two."""
    trainer = trainer_of(architecture(name), weight_decay=0.1)
    experts = [m for m in trainer.model.modules() if hasattr(m, "gate_up_proj") and m.gate_up_proj.dim() == 3]
    seen: list[set[int]] = [set() for _ in experts]
    for found, module in zip(seen, experts, strict=True):
        module.register_forward_pre_hook(lambda _, args, found=found: found.update(args[1].unique().tolist()))
    for module in trainer.model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _, args, out: (*out[:2], torch.ones_like(out[2]).cumsum(-1)))
    before = trained(trainer)
    assert seen == [{1, 2}] * len(experts)
    for key, parameter in trainer.model.named_parameters():
        if parameter.dim() == 3 and ".experts." in key:
            assert [torch.equal(a, b) for a, b in zip(parameter, before[key], strict=True)] == [
                True,
                False,
                False,
                True,
            ]


@pytest.mark.parametrize("kind", GATES)
def test_any_architecture_s_router_is_found(kind: str) -> None:
    """By its class in transformers: nothing here knows these models."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=5))
    found = freeze_routers(model)
    assert {name.split(".", 3)[3] for name in found} == set(GATES[kind].split())
    assert found == [name for name, p in sorted(model.named_parameters()) if not p.requires_grad]


def test_a_dense_model_has_none() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](num_hidden_layers=1))
    assert freeze_routers(model) == [] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("declared", [{}, {"router_logits": "MoeBlock"}])
def test_a_router_that_is_not_found_is_an_error(declared: dict[str, Any]) -> None:
    """Nothing is declared; or the block is, with all that is in it."""
    model = torch.nn.Module()
    model._can_record_outputs = declared
    model.MoeBlock = torch.nn.Module()
    model.MoeBlock.experts = torch.nn.Parameter(torch.zeros(4, 6, 6))
    with pytest.raises(ModelError, match="use --router trained"):
        freeze_routers(model)
    assert model.MoeBlock.experts.requires_grad


def test_a_journal_of_before_there_was_a_choice_says_nothing_of_it() -> None:
    plain = plain_hyperparameters(Hyperparameters().settled())
    assert plain.pop("router") == "frozen"
    assert hyperparameters(plain).router is None
