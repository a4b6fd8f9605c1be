"""CUDA IPC between two processes: the same pages, both ways, at no extra memory. Needs a GPU; no vLLM."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from worker.shared_weights.backend import SharingError
from worker.shared_weights.backends import opener_for
from worker.shared_weights.header import Header
from worker.shared_weights.weights_client import ask, read_header
from worker.utils import unix_socket

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

OWNER = """
import sys
from pathlib import Path
import torch
from torch import nn
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.backends import owner_for
from worker.serving.vllm.weight_service import WeightService

device = torch.device("cuda")
model = nn.Module()
model.filler = torch.zeros(12345, device=device)  # so that nothing starts where an allocation does
model.merged = nn.Parameter(torch.arange(4096 * 512, device=device).reshape(4096, 512).to(torch.bfloat16))
model.small = nn.Parameter(torch.ones(3, device=device))
model.tied = model.merged
owner = owner_for(device)
areas = owner.place(model, {"header": HEADER_BYTES, "state": 1000})
header = Header(areas["header"])
header.adopt("ab" * 16, 0)
addresses = [parameter.data_ptr() for parameter in model.parameters()]

def describe():
    tensors = dict(model.named_parameters()) | areas
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    return {"memory": owner.info(), "tensors": {n: owner.describe(t.detach()) for n, t in tensors.items()}}

def read_header():
    with owner.aside():
        return header.fields()

def sums():
    torch.cuda.synchronize()
    return {name: float(parameter.double().sum()) for name, parameter in model.named_parameters()}

def zero():
    with torch.no_grad():
        model.small.zero_()
    torch.cuda.synchronize()
    return {}

service = WeightService(Path(sys.argv[1]), {"describe": describe, "header": read_header, "sums": sums, "zero": zero})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cuda")
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield folder
    process.communicate(timeout=PATIENCE)


def opened(run_dir: Path) -> dict[str, torch.Tensor]:
    description, _ = ask(run_dir, "describe", 60)
    opener = opener_for(description["memory"])
    return {name: opener.open(one) for name, one in description["tensors"].items()}


def test_parameters_are_the_owner_s_own(run_dir: Path) -> None:
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()
    tensors = opened(run_dir)
    assert sorted(tensors) == ["header", "merged", "small", "state"]
    assert torch.cuda.memory_allocated() - before < 1 << 16  # mapped, not copied
    merged = tensors["merged"]
    assert merged.dtype == torch.bfloat16 and merged.shape == (4096, 512)
    assert torch.equal(merged.cpu(), torch.arange(4096 * 512).reshape(4096, 512).to(torch.bfloat16))
    was = ask(run_dir, "sums")[0]["merged"]
    merged[100:200].add_(1024)
    torch.cuda.synchronize()
    assert ask(run_dir, "sums")[0]["merged"] == float(merged.double().sum()) != was
    ask(run_dir, "zero")
    assert tensors["small"].tolist() == [0, 0, 0]


def test_two_openings_see_each_other(run_dir: Path) -> None:
    """Each description is for one opening; torch counts them."""
    one, other = opened(run_dir), opened(run_dir)
    one["state"][-1] = 7
    torch.cuda.synchronize()
    assert other["state"][-1].item() == 7
    del one
    assert opened(run_dir)["state"][-1].item() == 7


def test_header_is_ordered_with_the_kernels_before_it(run_dir: Path) -> None:
    tensors = opened(run_dir)
    header = Header(tensors["header"])
    header.begin(header.fence)
    assert read_header(run_dir)["state"] == "APPLYING"
    header.finish(3)
    assert read_header(run_dir) == {"lineage": "ab" * 16, "version": 3, "state": "CLEAN", "fence": 0}


def test_another_gpu_is_refused_by_its_uuid(run_dir: Path) -> None:
    memory = ask(run_dir, "describe")[0]["memory"]
    with pytest.raises(SharingError, match=r"CUDA_VISIBLE_DEVICES"):
        opener_for(memory | {"device_uuid": "00000000-0000-0000-0000-000000000000"})


def test_the_socket_still_refuses_unknown_questions(run_dir: Path) -> None:
    with pytest.raises(unix_socket.WireError, match="unknown op"):
        ask(run_dir, "pickle")
