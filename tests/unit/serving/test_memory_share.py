"""The trainer's share of a GPU: what `tandem serve` adds to vLLM's options for it, says about it, and refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.config.update_options import ApplySettings
from worker.data.batch_capacity import sizes_up_to
from worker.memory import planner
from worker.memory.divided import beside, divided
from worker.memory.graphs import graphs_beside
from worker.memory.model_config import TextConfig
from worker.memory.plan import Way
from worker.serving import launch, memory_share
from worker.trainer.device import within_share

GIB = 1 << 30
CONFIGS = Path(__file__).parents[2] / "data" / "configs"
H200 = "0, GPU-aaaa-1111, 143771\n"


def added_for(size: str, total: int) -> memory_share.Share:
    """What `tandem serve` adds for a Qwen3.5 of `size` on a device of `total` bytes."""
    config = TextConfig.read(CONFIGS / f"qwen3_5-{size}.json")
    plan = memory_share.with_graphs(memory_share.default_plan(config, total), config, total)
    return memory_share.flags_for(total, planner.weight_bytes(config), plan.total, plan.title())


@pytest.mark.parametrize(
    ("size", "gib", "way", "replayed"),
    [
        ("27B", 79, "streaming", 512),
        ("27B", 139, "streaming", 512),
        ("27B", 400, "burst", 512),
        ("9B", 139, "burst", 1024),
        ("9B", 79, "streaming", 1024),
        ("0.8B", 23, "burst", 2048),
    ],
)
def test_the_trainers_share_is_left_and_said(size: str, gib: int, way: Way, replayed: int) -> None:
    total = gib * GIB
    (flag, value), (note,), _ = added_for(size, total)
    assert flag == "--gpu-memory-utilization"
    config = TextConfig.read(CONFIGS / f"qwen3_5-{size}.json")
    plan = planner.make_plan(config, 8192, way=way, kept=0)
    assert memory_share.default_plan(config, total) == plan
    plan = memory_share.with_graphs(plan, config, total)
    assert plan.replayed == replayed
    said = "8,192 tokens a pass" + (f", rows of up to {replayed:,} tokens replayed as CUDA graphs" if replayed else "")
    left = total * (1 - float(value)) - plan.total - memory_share.MARGIN
    assert left >= 0
    assert left < total / 1000 + 1 or float(value) == memory_share.MOST
    assert f"{plan.total / 1e9:.2f} GB to the trainer ({way}, layers recomputed, {said})" in note
    assert f"{flag} {value}" in note


@pytest.mark.parametrize(
    ("size", "gib", "way", "by_factors", "replayed"),
    [
        ("27B", 79, "streaming", 512, 512),
        ("27B", 139, "streaming", 512, 512),
        ("4B", 79, "burst", 0, 2048),
        ("0.8B", 23, "burst", 0, 2048),
    ],
)
def test_a_worker_finds_the_way_that_was_planned_and_takes_no_more(
    size: str, gib: int, way: Way, by_factors: int, replayed: int
) -> None:
    """Before the server has grown, when more is free than its share, and after it has grown by all of the margin."""
    total, config = gib * GIB, TextConfig.read(CONFIGS / f"qwen3_5-{size}.json")
    share = added_for(size, total)
    environment = share.environment()
    settings = within_share(ApplySettings(), memory_share.share_of_environment(environment))
    assert settings.memory is not None
    left = int(total * (1 - float(share.options[1])))
    for grown in (0, memory_share.MARGIN):
        may = min(left - grown, int(settings.memory * 1e9))
        plan = planner.choose(config, 8192, may)
        assert plan.way == way and plan.total <= left - memory_share.MARGIN
        costs: dict[str, Any] = {"embeddings": "apollo", "context_bytes": planner.CONTEXT_BYTES}
        graphs = graphs_beside(config, sizes_up_to(8192), may, way=way, by_factors=True, **costs)
        assert max(graphs.rows, default=0) == replayed and graphs.total <= left - memory_share.MARGIN
        longest = planner.longest_by_factors(config, sizes_up_to(8192), may - graphs.held, **costs)
        longest = graphs.rows[-1] if graphs.lent else longest
        assert way == "burst" or longest >= by_factors


def test_what_the_user_said_of_the_trainers_memory_stays() -> None:
    assert within_share(ApplySettings(memory=5.0), 10**10).memory == 5.0
    assert within_share(ApplySettings(), 0).memory is None
    assert memory_share.share_of_environment(memory_share.Share([], []).environment()) == 0


@given(total=st.integers(1, 500 * GIB), taken=st.integers(0, 100 * GIB), share=st.integers(0, 100 * GIB))
def test_the_share_fits_or_is_refused(total: int, taken: int, share: int) -> None:
    try:
        (_, value), _, told = memory_share.flags_for(total, taken, share, "x")
    except launch.LaunchError:
        assert taken + share + memory_share.MARGIN + memory_share.LEAST_KV > total
        return
    assert 0 <= float(value) <= memory_share.MOST
    assert len(value) == len("0.123")
    assert round(float(value) * 1000) * total <= 1000 * (total - share - memory_share.MARGIN)
    assert share <= told <= total * (1 - float(value)) - memory_share.MARGIN + 1


def test_a_device_too_small_is_refused_with_numbers() -> None:
    with pytest.raises(launch.LaunchError) as refused:
        added_for("27B", 40 * GIB)
    for part in ("has 42.95 GB", "53.79 GB for the weights", "GB for the trainer (streaming", "--trainer-memory N"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--gpu-memory-utilization", "0.5"],
        ["--gpu_memory_utilization=0.5"],
        ["--gpu-memory-util", "0.5"],
        ["--device-memory-utilization", "0.5"],
        ["--kv-cache-memory-bytes", "5G"],
        ["--kv-cache-memory=5G"],
    ],
)
@pytest.mark.parametrize("memory", [None, 0, 20.0])
def test_what_the_user_said_about_memory_is_not_changed(options: list[str], memory: float | None) -> None:
    added, (note,), _ = memory_share.make_room("any", options, memory, {}, on_cpu=False)
    assert added == []
    assert options[0].partition("=")[0].replace("_", "-") in note


@pytest.mark.parametrize("line", ["gpu-memory-utilization: 0.5", "kv_cache_memory_bytes : 5G", "'kv-cache-memory': 1"])
def test_what_the_users_file_says_about_memory_is_not_changed(tmp_path: Path, line: str) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(f"port: 1\n{line}\n")
    added, (note,), _ = memory_share.make_room("any", ["--config", str(file)], None, {}, on_cpu=False)
    assert added == []
    assert str(file) in note
    file.write_text("port: 1\n# gpu-memory-utilization: 0.5\n")
    assert memory_share.said_by_user({"--config": [str(file)]}) is None
    assert memory_share.said_by_user({"--config": [str(tmp_path / "none")], "--kv-cache-dtype": ["auto"]}) is None


def test_no_share_where_none_was_wanted() -> None:
    added, (note,), _ = memory_share.make_room("any", [], 0, {}, on_cpu=False)
    assert (added, "--trainer-memory 0" in note) == ([], True)
    for memory in (None, 0):
        assert memory_share.make_room("any", [], memory, {}, on_cpu=True) == ([], [], 0)
    with pytest.raises(launch.LaunchError, match=r"^--trainer-memory is for GPUs"):
        memory_share.make_room("any", [], 20.0, {}, on_cpu=True)


@pytest.mark.parametrize(
    ("visible", "mib"),
    [
        (None, 143771),
        ("1", 81559),
        ("1,0", 81559),
        ("GPU-bbbb-2222", 81559),
        ("GPU-bb", 81559),
        ("GPU-aaaa-1111,1", 143771),
    ],
)
def test_the_first_visible_device_is_asked(visible: str | None, mib: int) -> None:
    assert memory_share.pick_device(H200 + "1, GPU-bbbb-2222, 81559\n", visible) == mib << 20


@pytest.mark.parametrize(
    ("table", "visible"),
    [("", None), (H200, ""), (H200, "-1"), (H200, "7"), (H200, "MIG-1"), (H200, "GPU"), ("0, GPU-a, [N/A]\n", None),
     ("No devices were found\n", None), ("0, GPU-a, 0\n", "0")],
)  # fmt: skip
def test_a_device_whose_memory_is_not_known_is_refused_with_a_way_out(table: str, visible: str | None) -> None:
    with pytest.raises(launch.LaunchError, match="--gpu-memory-utilization, or use --trainer-memory 0"):
        memory_share.pick_device(table, visible)


@given(st.text(max_size=200), st.none() | st.text(max_size=20))
def test_any_table_is_read_or_refused(table: str, visible: str | None) -> None:
    try:
        assert memory_share.pick_device(table, visible) > 0
    except launch.LaunchError as error:
        assert "memory is not known" in str(error)


def test_a_machine_without_nvidia_smi_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(launch.LaunchError, match=r"nvidia-smi failed: .*--trainer-memory 0"):
        memory_share.make_room("any", [], None, os.environ, on_cpu=False)


def test_the_share_comes_from_the_models_directory(tmp_path: Path) -> None:
    total = 143771 << 20
    (tmp_path / "config.json").write_text((CONFIGS / "qwen3_5-27B.json").read_text())
    added, (note,), _ = memory_share.share_of(str(tmp_path), {}, None, total)
    assert added == added_for("27B", total)[0]
    assert "--trainer-memory says otherwise" in note
    added, (note,), _ = memory_share.share_of("unknown/model", {}, 20.5, total)  # no config needed
    assert added == ["--gpu-memory-utilization", "0.844"]
    assert "20.50 GB to the trainer" in note
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    with pytest.raises(launch.LaunchError, match=r"hidden_size must be .*--trainer-memory N \(GB\)"):
        memory_share.share_of(str(tmp_path), {}, None, total)


def test_a_hub_name_is_looked_up_in_the_hubs_cache(tmp_path: Path) -> None:
    """In a process of its own: the cache's place and being offline are settled when huggingface_hub is imported."""
    commit = "0" * 40
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((CONFIGS / "qwen3_5-4B.json").read_text())
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    code = """
import sys
from worker.serving import memory_share
from worker.serving.vllm_flags import LaunchError
print(memory_share.find_config("some/model", {}))
for name, given in (("other/model", {}), ("some/model", {"--revision": ["v2"]}), ("no model: at all", {})):
    for find in (memory_share.find_config, lambda name, given: memory_share.share_of(name, given, None, 80 << 30)):
        try:
            find(name, given)
        except LaunchError as error:
            print(error)
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, *refused = run.stdout.splitlines()
    assert found == str(snapshot / "config.json")
    assert len(refused) == 6
    for asked, served in zip(refused[::2], refused[1::2], strict=True):
        assert "is not a directory, and its config.json was not found" in asked
        assert "--trainer-memory" not in asked  # `tandem check` has no such flag
        assert asked in served and served.endswith("--trainer-memory N (GB)")


@pytest.mark.parametrize(("text", "value"), [("auto", None), ("0", 0.0), ("12.5", 12.5), ("1e1", 10.0)])
def test_trainer_memory_is_read(text: str, value: float | None) -> None:
    assert memory_share.TrainerMemory().convert(text, None, None) == value


def test_each_device_of_a_divided_model_has_the_share_of_a_part(tmp_path: Path) -> None:
    """Half of the weights and state, a part's activations, and what NCCL and rank 0's process take there."""
    (tmp_path / "config.json").write_text((CONFIGS / "qwen3_5-27B.json").read_text())
    config, total = TextConfig.read(tmp_path / "config.json"), 141 * 10**9
    _, (note,), left = memory_share.share_of(str(tmp_path), {"--tensor-parallel-size": ["2"]}, None, total)
    plan = memory_share.default_plan(divided(config, 2), total, ranks=2)
    assert plan.way == "streaming" and plan.title() in note and left >= plan.total
    whole = memory_share.default_plan(config, total)
    assert beside(2) < plan.total < whole.total + beside(2)
    with pytest.raises(launch.LaunchError, match=r"the device has 30.00 GB, and .*: 26.94 GB for the weights"):
        memory_share.share_of(str(tmp_path), {"--tensor-parallel-size": ["2"]}, None, 30 * 10**9)
    for said in ("0", "two"):
        with pytest.raises(launch.LaunchError, match=f"--tensor-parallel-size {said}: say a number"):
            memory_share.make_room("any", ["-tp", said], None, {}, on_cpu=False)


def test_the_smallest_of_the_devices_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-a, 100'\necho '1, GPU-b, 70'\necho '2, GPU-c, 90'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for visible, devices, mib in ((None, 2, 70), ("2,0,1", 2, 90), ("0,1", 1, 100)):
        environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        assert memory_share.total_memory(environment, devices) == mib << 20
    with pytest.raises(launch.LaunchError, match="CUDA_VISIBLE_DEVICES='2' names fewer devices"):
        memory_share.total_memory({"CUDA_VISIBLE_DEVICES": "2"}, 2)
