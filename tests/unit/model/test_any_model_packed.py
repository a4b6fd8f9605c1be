"""Any model in packed rows, as a GPU trains it: with the kernels' stand-ins, on a CPU. Its loss and gradients are
transformers' own; what would mix the sequences of a row is refused by name, or noticed by the proof."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Configuration
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from producer.errors import TandemError
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example, TokenSequence
from worker.model import attention, fuse
from worker.model.fused_parts import STAND_INS, fuse_parts
from worker.model.layer_trace import NAME, sizes_of, trace
from worker.model.layers import layers_of
from worker.shared_weights.bind import build_model, on_meta
from worker.testing.tiny_architectures import ARCHITECTURES
from worker.trainer.factory import make_trainer
from worker.trainer.proof import ProofError, prove_trainer
from worker.trainer.trainer import Trainer

Make = Callable[[str], Path]
MOST_TOKENS = 256
REFUSED = {
    "gemma2": r"Gemma2Attention wants softcap of its attention",
    "qwen3_next": r"layers\.0\.linear_attn\.conv1d \(Conv1d\) would mix the sequences of a packed row",
}
TRAINED = sorted(ARCHITECTURES.keys() - REFUSED.keys() - {"qwen3_5_moe_text"})
PARTS = {
    "cohere": (0, 2), "cohere2": (0, 2), "gemma3_text": (13, 2), "glm4": (9, 2), "granite": (5, 2), "llama": (5, 2),
    "mistral": (5, 2), "olmo2": (9, 2), "olmo3": (9, 2), "phi": (0, 0), "phi3": (5, 2), "qwen2": (5, 2),
    "qwen3": (9, 2), "qwen3_moe": (9, 0), "smollm3": (5, 2),
}  # fmt: skip
"""Norms and MLPs that kernels are found for, in two layers: Cohere and Phi have LayerNorms, Phi no gate."""


def packed(folder: Path, kept: int = 0) -> tuple[Trainer, Any, Any]:
    """(a trainer of packed rows on the very weights of a model, that model, its tokenizer)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bound = build_model(folder, {name: parameter.data for name, parameter in model.named_parameters()})
    fuse(bound, lambda tokens: kept, STAND_INS)
    h = Hyperparameters(max_length=MOST_TOKENS, router="trained").settled()
    trainer = make_trainer(bound, list(bound.named_parameters()), tokenizer, h, state=None)
    trainer.packed, trainer.sizes = True, (512, 1024)
    return trainer, model, tokenizer


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.float() for name, p in trainer.model.named_parameters() if p.grad is not None}


QUICK = ("gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen3_moe")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]


@pytest.mark.parametrize("name", EACH)
def test_loss_and_gradients_of_packed_rows_are_the_model_s_own(architecture: Make, name: str) -> None:
    trainer, model, tokenizer = packed(architecture(name), kept=1)
    expected = prove_trainer(trainer, model, tokenizer, MOST_TOKENS)
    sizes = [len(expected.ids), 20, 7]
    sequences = [TokenSequence(expected.ids[:n], (False, *[True] * (n - 1))) for n in sizes]
    model.set_attn_implementation("eager")
    total = sum(n - 1 for n in sizes)
    for sequence in sequences:
        row = torch.tensor([sequence.ids])
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        (loss * (len(sequence.ids) - 1) / total).backward()
    theirs = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    trainer.begin([Example("one", tuple(sequences), 1.0, {})])
    ours = gradients(trainer)
    assert ours.keys() == theirs.keys()
    for part in ours:
        assert (ours[part] - theirs[part]).norm() <= 0.2 * theirs[part].norm() + 1e-6, part


@pytest.mark.parametrize("name", TRAINED)
def test_kernels_are_found_for_the_parts_that_they_fit(architecture: Make, name: str) -> None:
    fused = fuse_parts(on_meta(architecture(name)), STAND_INS)
    assert (fused.norms, fused.mlps) == PARTS[name]


def test_what_is_left_as_transformers_wrote_it_is_said_once_a_class_with_the_reason(
    architecture: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="tandem"):
        fuse(on_meta(architecture("phi3")), kernels=STAND_INS)
        fuse(on_meta(architecture("cohere")), kernels=STAND_INS)
    phi3, cohere = [line for line in caplog.messages if "stays as transformers wrote it" in line]
    assert phi3.startswith("Phi3Attention (2 of them)") and "does not take small tensors" in phi3
    assert "TypeError: Phi3Attention.forward() missing" in phi3
    assert cohere.startswith("CohereLayerNorm (3 of them)") and "something else than an RMSNorm" in cohere


@pytest.mark.parametrize("name", REFUSED)
def test_what_packed_rows_would_lose_is_refused_by_name(architecture: Make, name: str) -> None:
    with pytest.raises(TandemError, match=REFUSED[name]):
        sizes_of(architecture(name))


def test_a_window_that_only_a_mask_has_is_refused(architecture: Make) -> None:
    """No row of the proof reaches a window of 4,096."""
    model = on_meta(architecture("mistral"))
    for layer in model.model.layers:
        layer.self_attn.config = Configuration(_attn_implementation=NAME, sliding_window=None)
    with pytest.raises(TandemError, match="has a window of 16 tokens and does not tell its attention"):
        trace(model)


def test_layers_of_an_unknown_reach_are_refused(architecture: Make) -> None:
    model = on_meta(architecture("llama"))
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(TandemError, match="layers of type 'chunked_attention' are not known to packed rows"):
        trace(model)


def test_layers_that_are_not_told_where_sequences_begin_are_refused(architecture: Make) -> None:
    model = on_meta(architecture("llama"))
    plain = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda packing, **named: plain(**named)
    with pytest.raises(TandemError, match="LlamaAttention is not told where packed sequences begin"):
        trace(model)


def test_tokens_that_see_later_ones_are_refused(architecture: Make) -> None:
    model = on_meta(architecture("llama"))
    model.model.layers[1].self_attn.is_causal = False
    model.config.layer_types = ["full_attention", "sliding_attention"]  # another kind, so that both are looked at
    with pytest.raises(TandemError, match="LlamaAttention lets tokens see later ones"):
        trace(model)


def test_sequences_that_see_each_other_are_noticed(architecture: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, model, tokenizer = packed(architecture("llama"))
    plain = attention.attend_by_sequence

    def one_row(query: Any, key: Any, value: Any, packing: Any, *others: Any) -> Any:
        whole = type(packing)(torch.tensor([0, len(query)]), packing.starts32, packing.chunks, len(query))
        return plain(query, key, value, whole, *others)

    monkeypatch.setattr(attention, "attend_by_sequence", one_row)
    with pytest.raises(ProofError, match="the loss of a sequence that shares its row with another is not"):
        prove_trainer(trainer, model, tokenizer, MOST_TOKENS)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "glm4"])
def test_the_last_layers_keep_their_activations_and_nothing_changes(architecture: Make, name: str) -> None:
    example = Example("one", (TokenSequence(tuple(range(5, 45)), (False, *[True] * 39)),), 1.0, {})
    found = []
    for kept in (0, 2):
        trainer, _, _ = packed(architecture(name), kept=kept)
        assert list(layers_of(trainer.model)) == list(trainer.model.model.layers)
        trainer.begin([example])
        assert [layer.gradient_checkpointing for layer in layers_of(trainer.model)] == [kept == 0] * 2
        found.append(gradients(trainer))
    assert all(torch.equal(found[0][part], found[1][part]) for part in found[0])


def test_the_layers_of_a_qwen_are_found_as_well(architecture: Make, tiny_model: Path) -> None:
    for folder in (tiny_model, architecture("qwen3_5_moe_text"), architecture("qwen3_next")):
        model = on_meta(folder)
        assert layers_of(model) is model.model.layers and model.base_model is model.model


def test_a_head_that_is_too_large_is_refused(architecture: Make, tmp_path: Path) -> None:
    config = json.loads((architecture("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 512}))
    with pytest.raises(TandemError, match="has heads of 512 numbers"):
        sizes_of(tmp_path)
