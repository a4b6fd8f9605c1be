"""benchmarks/shapes.py: directories of the real dimensions, which transformers reads as the models they stand for."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from shapes import MIXTURE, SIZES, write_files, write_shape

from worker.testing.tiny_model import build_tokenizer, make_tiny
from worker.utils import torch_setup

TEXT_PARAMETERS = {
    "0.8B": 752_393_024,
    "2B": 1_881_825_088,
    "4B": 4_205_751_296,
    "9B": 8_953_803_264,
    "27B": 26_895_998_464,
    "35B-A3B": 34_660_610_688,
}
"""Of the published models; tied embeddings once."""


def test_the_real_sizes_have_the_published_parameter_counts(tmp_path: Path) -> None:
    torch_setup.prepare()
    assert set(TEXT_PARAMETERS) | {"tiny"} == set(SIZES)
    for size, count in TEXT_PARAMETERS.items():
        folder = write_shape(size, tmp_path / size)
        assert not list(folder.glob("*.safetensors"))
        config = AutoConfig.from_pretrained(folder)
        kind = "Qwen3_5Moe" if size == MIXTURE else "Qwen3_5"
        assert config.architectures == [f"{kind}ForConditionalGeneration"]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == count, size


@pytest.mark.parametrize("size", ["tiny", "27B", "tiny-llama"])
def test_the_tokenizer_knows_every_token_that_the_model_can_say(tmp_path: Path, size: str) -> None:
    folder = write_shape(size, tmp_path / size)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    words, own = config.get_text_config().vocab_size, build_tokenizer()
    assert len(tokenizer) == words
    assert all(len(text) >= 5 for text in tokenizer.batch_decode([[number] for number in range(len(own), words)]))
    text = "Hello <|im_start|>world, word1024  word2000\n"
    assert tokenizer.encode(text) == own.encode(text), "but no text is made of what was added"
    if size != "tiny-llama":
        assert tokenizer.convert_ids_to_tokens(config.image_token_id) == "<|image_pad|>"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert turn.startswith("<|im_start|>user\nHi<|im_end|>")


def test_random_files_have_the_published_names_and_layers_that_differ(tmp_path: Path) -> None:
    torch_setup.prepare()
    folder = write_shape("tiny", tmp_path / "files")
    write_files(folder)
    found = load_file(next(folder.glob("*.safetensors")))
    published = load_file(next(make_tiny(tmp_path / "published", vision=True).glob("*.safetensors")))
    without_numbers = [{re.sub(r"\.\d+\.", ".N.", name) for name in names} for names in (found, published)]
    assert without_numbers[0] == without_numbers[1]
    same = [tensor for name, tensor in found.items() if re.search(r"language_model.*mlp\.up_proj", name)]
    assert len(same) > 1 and not torch.equal(same[0], same[1])
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert 0.015 < same[0].float().std() < 0.025
