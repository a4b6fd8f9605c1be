"""How many tokens a step of vLLM's has, where nobody said."""

from pathlib import Path

import pytest

from worker.cli import serve
from worker.serving.step_size import FLAG, are_meant, step_size

H100 = "NVIDIA H100 80GB HBM3, 81559"


def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """One on which nvidia-smi says this."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{says}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_an_h100_takes_shorter_steps_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, H100)
    options, (note,) = step_size(["--max-num-seqs", "16"], on_cpu=False)
    assert options == [FLAG, "4096"]
    assert note.startswith(f"{FLAG} 4096") and "8192" in note


def test_vllm_is_started_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, H100)
    started: list[list[str]] = []
    monkeypatch.setattr(serve, "is_cpu_build", lambda: False)  # no build of vLLM for GPUs is here
    monkeypatch.setattr("os.execve", lambda program, arguments, environment: started.append(arguments))
    options = [str(tmp_path), "--run-dir", str(tmp_path / "run"), "--trainer-memory", "0", "--max-num-seqs", "16"]
    serve.command.main(options, standalone_mode=False)
    (arguments,) = started
    assert arguments[arguments.index(FLAG) + 1] == "4096"


@pytest.mark.parametrize(
    "said",
    [
        [FLAG, "8192"],
        ["--max_num_batched_tokens=2048"],
        ["--max-num-seqs", "5000"],
        ["--no-enable-chunked-prefill"],
        ["--enable-chunked-prefill=False"],
        ["--performance-mode", "throughput"],
        ["--speculative-config", '{"method": "dflash", "num_speculative_tokens": 8}'],
        ["--speculative-config.method", "dflash"],
        ["--spec-method", "ngram"],
    ],
)
def test_what_the_user_said_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    machine(tmp_path, monkeypatch, H100)
    assert step_size(said, on_cpu=False) == ([], [])


def test_what_a_file_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, H100)
    file = tmp_path / "vllm.yaml"
    file.write_text("max-num-batched-tokens: 8192\n")
    assert step_size(["--config", str(file)], on_cpu=False) == ([], [])


@pytest.mark.parametrize(
    ("devices", "meant"),
    [
        (H100, True),
        ("NVIDIA H200, 143771", True),
        (f"{H100}\nNVIDIA H200, 143771", True),
        ("NVIDIA A100-SXM4-80GB, 81920", False),
        ("NVIDIA B200, 183359", False),
        ("NVIDIA L4, 23034", False),
        (f"{H100}\nNVIDIA L4, 23034", False),
        ("NVIDIA H100 MIG, [N/A]", False),
        ("No devices were found", False),
        ("", False),
    ],
)
def test_only_devices_whose_default_is_8192(devices: str, meant: bool) -> None:
    assert are_meant(devices) is meant


def test_a_device_that_is_not_known_keeps_vllms_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    options, (note,) = step_size([], on_cpu=False)
    assert options == [] and "nvidia-smi failed" in note
    assert step_size([], on_cpu=True) == ([], [])
