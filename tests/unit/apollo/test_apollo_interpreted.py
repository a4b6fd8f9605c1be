"""The CUDA implementation without a GPU: its kernels, in Triton's interpreter, must pass what they must on a device."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "file",
    [
        "test_apollo_gpu.py",
        "test_factored_gpu.py",
        "test_experts_gpu.py",
        "test_products_gpu.py",
        "test_decided_sweep_gpu.py",
        "test_head_kernels_gpu.py",
        pytest.param("test_shards_gpu.py", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter(file: str) -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    tests = Path(__file__).parents[2] / "gpu" / file
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tests.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
