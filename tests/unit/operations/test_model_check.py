"""`tandem check`: what config.json alone says of a model; the page has the table that it makes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from worker.cli.check import command
from worker.operations.model_check import CheckError, check_model, table

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "data" / "configs"
BILLIONS = {
    "Llama-3.1-8B": 8.03, "Qwen2.5-7B": 7.62, "Qwen3-8B": 8.19, "Qwen3-30B-A3B": 30.53, "Mistral-7B-v0.3": 7.25,
    "Phi-3-mini-4k": 3.82, "gemma-2-9b": 9.24, "gemma-3-1b": 1.0, "granite-3.3-8b": 8.17, "OLMo-2-7B": 7.3,
    "gpt-oss-20b": 20.91, "qwen3_5-35B-A3B": 34.66,
}  # fmt: skip
"""As their publishers say."""
SIZE = 80_000_000_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> a directory with nothing but a published configuration."""
    found = {}
    for file in [*(CONFIGS / "other").glob("*.json"), *CONFIGS.glob("*.json")]:
        folder = tmp_path_factory.mktemp("configs") / file.stem
        folder.mkdir()
        (folder / "config.json").write_bytes(file.read_bytes())
        found[file.stem] = folder
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: check_model(folder, SIZE, "apollo-mini") for name, folder in folders.items()}


def test_the_parameters_are_counted(answers: dict[str, dict[str, Any]]) -> None:
    assert {name: round(answers[name]["parameters"] / 1e9, 2) for name in BILLIONS} == BILLIONS


SEEN = {"Llama-3.1-8B", "Qwen3-8B", "gemma-3-1b"}
NOT_ON_A_GPU = {"gpt-oss-20b", "gemma-2-9b", "qwen3_5-35B-A3B"}


def test_which_models_are_trained_on_a_cpu_and_on_a_gpu_and_which_a_gpu_has_run(
    answers: dict[str, dict[str, Any]],
) -> None:
    for name, answer in answers.items():
        assert answer["cpu"]["trainable"] == (name != "gpt-oss-20b")
        assert answer["gpu"]["trainable"] == (name not in NOT_ON_A_GPU)
        assert answer["gpu"].get("seen") == (
            (name in SEEN or name.startswith("qwen3_5")) if name not in NOT_ON_A_GPU else None
        )
    llama, qwen = answers["Llama-3.1-8B"], answers["qwen3_5-27B"]
    assert llama["cpu"]["bytes"]["gradients"] == llama["cpu"]["bytes"]["weights"] == 2 * llama["parameters"]
    assert (llama["gpu"]["way"], llama["gpu"]["bytes"]["weights"]) == ("streaming", 2 * llama["parameters"])
    assert 6e9 < llama["gpu"]["bytes"]["trainer"] < 8e9
    assert "softcap" in answers["gemma-2-9b"]["gpu"]["reason"] and "/" not in answers["gemma-2-9b"]["gpu"]["reason"]
    assert qwen["gpu"]["way"] == "streaming" and qwen["gpu"]["bytes"]["total"] < SIZE
    assert "quantized" in answers["gpt-oss-20b"]["cpu"]["reason"]


def test_a_mixture_takes_a_matrix_an_expert(folders: dict[str, Path], answers: dict[str, dict[str, Any]]) -> None:
    """0.36 GB of state, as DESIGN and the page say; on a GPU of 141 GB it is streamed, on one of 80 it does not fit."""
    found = answers["qwen3_5-35B-A3B"]
    assert round(found["cpu"]["bytes"]["optimizer"] / 1e9, 2) == 0.36 and "80.00 GB" in found["gpu"]["reason"]
    larger = check_model(folders["qwen3_5-35B-A3B"], 141_000_000_000, "apollo-mini")["gpu"]
    assert larger["way"] == "streaming" and larger["bytes"]["optimizer"] == found["cpu"]["bytes"]["optimizer"]


def test_what_follows_the_head_is_said(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["granite-3.3-8b"]["head"] == {"scale": pytest.approx(1 / 16), "cap": None, "bias": False}
    assert answers["gemma-2-9b"]["head"] == {"scale": 1.0, "cap": pytest.approx(30.0), "bias": False}


def test_a_gpu_that_is_too_small_is_said_with_numbers(folders: dict[str, Path]) -> None:
    found = check_model(folders["qwen3_5-27B"], 40_000_000_000, "apollo-mini")["gpu"]
    assert not found["trainable"] and "40.00 GB" in found["reason"]


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "none such"}, {"model_type": "llama", "hidden_size": "wide"}, {"model_type": "vit"}]
)
def test_what_is_no_language_model_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        found = check_model(tmp_path, SIZE, "apollo-mini")
    except CheckError as error:
        assert str(tmp_path) in str(error)
    else:
        assert not found["cpu"]["trainable"] and not found["gpu"]["trainable"]


def test_what_a_server_is_known_to_refuse_is_said_with_what_can_be_done(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi"}))
    found = check_model(tmp_path, SIZE, "apollo-mini")
    assert found["head"]["bias"] and not found["cpu"]["trainable"] and not found["gpu"]["trainable"]
    assert "bias of the head" in found["cpu"]["reason"] and "`tandem train --model`" in found["cpu"]["reason"]


def test_the_command_says_it_to_people_and_to_programs(folders: dict[str, Path]) -> None:
    said = CliRunner().invoke(command, [str(folders["qwen3_5-0.8B"])])
    assert (
        said.exit_code == 0 and "on a CPU: yes, by burst" in said.output and "on a GPU of 80.00 GB: yes" in said.output
    )
    plain = CliRunner().invoke(command, ["--json", str(folders["gpt-oss-20b"])])
    assert plain.exit_code == 1 and json.loads(plain.output)["model"] == "gpt-oss-20b"


def test_the_page_has_the_table(answers: dict[str, dict[str, Any]], folders: dict[str, Path]) -> None:
    """Written by `tandem check --table` over tests/data/configs; of 141 GB, one column."""
    page = (ROOT / "docs" / "models.md").read_text()
    assert table(list(answers.values())) in page
    for name in ("Llama-3.1-8B", "Qwen3-8B"):
        row = table([check_model(folders[name], 141_000_000_000, "apollo-mini")]).splitlines()[2]
        assert f"| {name} | {row.split(' | ')[4]} |" in page
