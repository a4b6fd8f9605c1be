"""What a record's circumstances are compared with."""

from pathlib import Path

import pytest
import torch

from worker.checkpoint import replay

X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R): a Xeon\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def facts_of(cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    (tmp_path / "cpuinfo").write_text(cpu + "\n" + ARM)  # of a second processor, which does not count
    monkeypatch.setattr(replay, "CPU_INFO", tmp_path / "cpuinfo")
    return replay.facts(torch.device("cpu"))


def test_another_kind_of_cpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in replay.ONEDNN_ISA:
        monkeypatch.delenv(name, raising=False)
    then = facts_of(X86, tmp_path, monkeypatch)
    assert then["cpu"] == "GenuineIntel 6 207" and replay.differences(then, facts_of(X86, tmp_path, monkeypatch)) == []
    now = facts_of(ARM, tmp_path, monkeypatch)
    assert replay.differences(then, now) == ["cpu was GenuineIntel 6 207 and is 0x41 0xd40"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    now = facts_of(X86, tmp_path, monkeypatch)
    assert replay.differences(then, now) == ["cpu was GenuineIntel 6 207 and is GenuineIntel 6 207 up to AVX2"]


def test_a_record_that_does_not_say_its_cpu_differs_in_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = facts_of(X86, tmp_path, monkeypatch)
    older = {name: value for name, value in now.items() if name != "cpu"}
    assert replay.differences(older, now) == []
    assert replay.differences(older | {"torch": "2.0"}, now) == [f"torch was 2.0 and is {torch.__version__}"]


def test_threads_are_set_as_they_were_and_are_no_difference() -> None:
    now = replay.facts(torch.device("cpu"))
    assert replay.differences(now | {"threads": 77}, now) == []


def test_a_machine_that_says_nothing_of_its_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CPU_INFO", tmp_path / "none")
    for name in replay.ONEDNN_ISA:
        monkeypatch.delenv(name, raising=False)
    assert replay.facts(torch.device("cpu"))["cpu"] == ""
