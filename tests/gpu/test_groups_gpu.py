"""Two members of a group on two GPUs, over NCCL: sums, one that is gone while the other adds up, one that leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE

from worker.testing.server_process import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "helpers" / "group_member.py"
SUMS = [3.0] * 6


def member(place: int, address: str, scenario: str, seconds: float = 10.0) -> subprocess.Popen[str]:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": seen[place],
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(PROGRAM), str(place), address, scenario, str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    return dict(json.loads(out.splitlines()[-1]))


def test_sums_are_everybodys() -> None:
    address = f"127.0.0.1:{free_port()}"
    members = [member(place, address, "sum") for place in (0, 1)]
    assert [said(one)["first"] for one in members] == [SUMS, SUMS]


@pytest.mark.parametrize("scenario", ["lost", "left"])
def test_one_that_is_gone_is_noticed_and_a_new_group_works(scenario: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    first, second = (member(place, address, scenario) for place in (0, 1))
    second.communicate(timeout=PATIENCE)
    assert second.returncode == (9 if scenario == "lost" else 0)
    assert first.stdout is not None
    for line in first.stdout:
        if line == "ready\n":
            break
    third = member(1, address, "sum")
    found = said(first)
    assert found["first"] == found["again"] == said(third)["first"] == SUMS
    assert found["lost"] and found["device works"] == 6.0
