"""The small Qwen3.5: real architecture, loadable, the same from the same seed."""

import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from worker.cli.tiny import command
from worker.testing.tiny_model import NOT_SPECIAL, SPECIAL, TinyError, build_tokenizer, make_tiny


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    one, two, other = (make_tiny(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert digests(one) == digests(two)
    changed = {name for name, digest in digests(one).items() if digests(other)[name] != digest}
    assert changed == {"model.safetensors"}
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are not disturbed


def test_loads_as_qwen3_5(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and model.dtype == torch.bfloat16
    config = model.config
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.linear_key_head_dim == config.linear_value_head_dim == 64  # what vLLM's kernels take
    assert config.max_position_embeddings >= 4096 and not config.tie_word_embeddings
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer).__name__ == "Qwen3_5Tokenizer" and len(tokenizer) == config.vocab_size
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert tokenizer.eos_token_id == ends[0] and tokenizer.pad_token_id == config.eos_token_id == ends[1]
    assert torch.isfinite(model(torch.tensor([tokenizer.encode("Hello there")])).logits).all()


def test_initialised_as_a_fresh_model(tmp_path: Path) -> None:
    weights = load_file(make_tiny(tmp_path / "tiny") / "model.safetensors")
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16, name
        if name.endswith(("layernorm.weight", "_norm.weight", "model.norm.weight")):
            assert not tensor.any(), name  # (1 + w) norms
        elif tensor.dim() == 2:
            assert tensor.float().std() == pytest.approx(0.02, rel=0.05), name


def test_vision_tower(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny", vision=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    names = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in names)
    from transformers import AutoModelForCausalLM, AutoProcessor

    # The text model inside is the one without the tower would have been, but for the draws.
    text = AutoModelForCausalLM.from_pretrained(folder)
    alone = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "alone"))
    assert {n: p.shape for n, p in text.named_parameters()} == {n: p.shape for n, p in alone.named_parameters()}
    assert text.dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen3VLProcessor"


@pytest.mark.parametrize(
    "text", ["Hello, wörld!\n\n日本語 \t 12345", "def f(x):\n    return", "e\u0301 \u200b\U0001f600"]
)
def test_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_tokenizer_tokens() -> None:
    tokenizer = build_tokenizer("think")
    for token in SPECIAL + NOT_SPECIAL:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    words = "What is the capital of France?"
    assert len(tokenizer.encode(words)) <= 8  # merges were learnt: bytes alone would be 30
    ids = tokenizer.encode("<|im_start|><think>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize(("template", "opens"), [("nothink", "<think>\n\n</think>\n\n"), ("think", "<think>\n")])
def test_command(tmp_path: Path, template: str, opens: str) -> None:
    folder = tmp_path / "new" / "tiny"
    result = CliRunner().invoke(command, [str(folder), "--template", template, "--seed", "5"])
    assert result.exit_code == 0 and "seed 5" in result.output
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "Hi"}]
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>assistant\n" + opens)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(TinyError, match="is not an empty directory"):
            make_tiny(path)
    with pytest.raises(TinyError, match="template must be one of"):
        make_tiny(tmp_path / "x", template="other")
    with pytest.raises(TinyError, match="multiple of 64"):
        make_tiny(tmp_path / "x", hidden=100)
    assert not (tmp_path / "x").exists() and (tmp_path / "mine").read_text() == "precious"
