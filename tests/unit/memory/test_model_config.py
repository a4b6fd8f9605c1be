"""A model's sizes from its config.json: against transformers' own models, and files that are refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.memory.model_config import ConfigError, TextConfig, has_experts
from worker.utils.torch_setup import prepare

FOLDER = Path(__file__).parents[2] / "data" / "configs"
SIZES = ("0.8B", "2B", "4B", "9B", "27B")


def config_of(size: str) -> TextConfig:
    return TextConfig.read(FOLDER / f"qwen3_5-{size}.json")


def contents(size: str = "0.8B") -> dict[str, Any]:
    return json.loads((FOLDER / f"qwen3_5-{size}.json").read_text())


@pytest.mark.parametrize("size", [*SIZES, "35B-A3B"])
def test_names_and_shapes_are_those_of_transformers_model(size: str) -> None:
    prepare()
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = contents(size)
    text = whole.get("text_config", whole)
    config = AutoConfig.for_model(**text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert config_of(size).parameters() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert config_of(size).count() == model.num_parameters()


def test_layer_types_may_be_left_to_the_interval() -> None:
    config = contents("27B")
    del config["text_config"]["layer_types"]
    assert TextConfig.of(config) == config_of("27B")
    assert TextConfig.of(contents("27B")["text_config"]) == config_of("27B")  # without the vision tower's wrapping


@given(st.sampled_from(sorted(contents()["text_config"])), st.sampled_from([None, -1, 0, "8", 1.5, True, [], {}]))
def test_a_wrong_field_is_refused_by_name_or_not_used(field: str, value: object) -> None:
    config = contents()
    config["text_config"][field] = value
    try:
        parsed = TextConfig.of(config, "x/config.json")
    except ConfigError as error:
        assert str(error).startswith("x/config.json: ")
        assert field in str(error)
    else:
        numbers = [size for shape in parsed.parameters().values() for size in shape]
        assert math.prod(numbers) > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "must be an object"),
        (b'{"model_type": "llama"}', "model_type is 'llama'"),
        (b'{"model_type": "qwen3_moe"}', "only Qwen3.5 (qwen3_5, qwen3_5_moe)"),
        (b'{"model_type": "qwen3_5_moe"}', "hidden_size must be a positive whole number, not None"),
        (b'{"model_type": "qwen3_5", "text_config": 1}', "text_config must be an object"),
        (b'{"model_type": "qwen3_5"}', "hidden_size must be a positive whole number, not None"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        TextConfig.read(path)
    assert str(path) in str(refused.value)


def test_a_mixture_s_missing_field_is_refused_by_name() -> None:
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
        config = contents("35B-A3B")
        del config[field]
        with pytest.raises(ConfigError, match=f": {field} must be a positive whole number, not None"):
            TextConfig.of(config)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_experts": 128}, True),
        ({"text_config": {"num_local_experts": 8}}, True),
        ({"n_routed_experts": 64}, True),
        ({"moe_num_experts": [64, 64]}, True),
        ({"num_experts": 0}, False),
        ({"num_experts": None, "hidden_size": 8}, False),
        ({"text_config": 1}, False),
        ({}, False),
    ],
)
def test_any_mixture_is_known_by_its_config(config: dict[str, Any], found: bool) -> None:
    assert has_experts(config) == found


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TextConfig.read(tmp_path / "config.json")
