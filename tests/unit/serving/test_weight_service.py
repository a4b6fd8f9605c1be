"""weights.sock where the process that answers is bound to one CPU, as vLLM's CPU backend binds its worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.shared_weights.weights_client import ask

BOUND = """
import os, sys
from pathlib import Path
from worker.serving.vllm.weight_service import WeightService
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
service = WeightService(Path(sys.argv[1]), {"header": lambda: {"cpus": sorted(os.sched_getaffinity(0))}})
print(sorted(os.sched_getaffinity(0)), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_answers_do_not_wait_for_the_cpu_that_computes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BOUND, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        bound = process.stdout.readline().strip()
        try:
            answer, pid = ask(tmp_path / "run", "header")
        finally:
            process.stdin.close()
    assert pid == process.pid and bound == str([min(os.sched_getaffinity(0))])
    assert answer["cpus"] == sorted(os.sched_getaffinity(0))
