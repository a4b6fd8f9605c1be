"""Text tensors are found in the files of a checkpoint: under a wrapper's prefix, and one matrix for each expert."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from worker.checkpoint import model_directory
from worker.shared_weights.errors import AttachError
from worker.shared_weights.spot_check import spot_check
from worker.shared_weights.stored_form import stored_names, stored_parts

SPLIT = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next"]
TEXT = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: p.data for n, p in AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters()}


@pytest.mark.parametrize("name", ["llama", *SPLIT])
def test_every_stored_tensor_is_a_view_with_its_very_values(architecture: Callable[[str], Path], name: str) -> None:
    folder = architecture(name)
    tensors, files = loaded(folder), load_file(folder / "model.safetensors")
    parts = stored_parts(files.keys(), tensors, folder)
    assert parts.keys() == files.keys() and (name == "llama") == all(part.whole for part in parts.values())
    for key, part in parts.items():
        assert torch.equal(part.view, files[key])
        assert part.view.untyped_storage().data_ptr() == tensors[part.name].untyped_storage().data_ptr()
    assert sum(part.view.numel() for part in parts.values()) == sum(tensor.numel() for tensor in tensors.values())


def test_a_stacked_tensor_of_which_an_expert_is_missing_is_not_there(architecture: Callable[[str], Path]) -> None:
    folder = architecture("qwen3_moe")
    tensors, files = loaded(folder), load_file(folder / "model.safetensors")
    del files["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert "model.layers.1.mlp.experts.gate_up_proj" not in {
        part.name for part in stored_parts(files.keys(), tensors, folder).values()
    }


@pytest.mark.parametrize(
    ("prefix", "head"), [("model.", ""), ("model.language_model.", ""), ("language_model.model.", "language_model.")]
)
def test_a_wrapper_s_prefix_is_found(prefix: str, head: str) -> None:
    stored = [name.replace("model.", prefix, 1) if name.startswith("model.") else head + name for name in TEXT]
    others = ["visual.layers.0.mlp.up_proj.weight", "model.vision_tower.embeddings.weight"]
    assert stored_names({*stored, *others}, TEXT) == dict(zip(TEXT, stored, strict=True))


def test_two_exchanged_experts_differ_from_the_checkpoint(architecture: Callable[[str], Path]) -> None:
    folder = architecture("qwen3_moe")
    tensors = loaded(folder)
    spot_check(folder, tensors)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        with pytest.raises(AttachError, match=r"experts\.1\.\w+_proj.weight as the server holds it differs"):
            spot_check(folder, tensors | {name: tensors[name][[0, 2, 1, 3]]})


@pytest.mark.parametrize("name", SPLIT)
def test_a_written_directory_has_the_published_form(
    architecture: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    tensors = {key: tensor * 1.5 for key, tensor in loaded(architecture(name)).items()}
    (tmp_path / "new").mkdir()
    model_directory.write_layout(tensors, architecture(name), tmp_path / "new")
    before = load_file(architecture(name) / "model.safetensors")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key] * 1.5) for key in after)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded(tmp_path / "new").items())
