"""Sharing with an unrelated process: real vLLM models exported by the real engine, attached from here.

The owner (weights_owner.py) is vLLM's model code in a process of its own, without the HTTP server around it.
"""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from safetensors.torch import load_file
from weights_parts import Owner, padded_model

from producer.errors import TandemError
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights import bind
from worker.shared_weights.attach import AttachedWeights, AttachError, attach, read_header
from worker.shared_weights.spot_check import spot_check
from worker.shared_weights.weights_client import ask
from worker.testing.tiny_model import make_tiny
from worker.utils import torch_setup, unix_socket

KINDS = ("text", "vision", "tied", "padded")


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    torch_setup.prepare()
    base = tmp_path_factory.mktemp("weights")
    models = {
        "text": make_tiny(base / "text", seed=1),
        "vision": make_tiny(base / "vision", seed=2, vision=True),
        "tied": make_tiny(base / "tied", seed=3, tie=True),
    }
    models["padded"] = padded_model(models["text"], base / "padded")
    owner = Owner(models, base)
    yield owner
    owner.close()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def on_disk(weights: AttachedWeights) -> dict[str, torch.Tensor]:
    stored = load_file(weights.model_path / "model.safetensors")
    return {name.replace("model.language_model.", "model."): tensor for name, tensor in stored.items()}


def test_exporting_changes_no_parameter(owner: Owner, kind: str) -> None:
    report = owner.ask(check=owner.index(kind))
    assert report["changed"] == [] and report["parameters"] > 30
    assert report["model_class"] == ("Qwen3_5ForConditionalGeneration" if kind == "vision" else "Qwen3_5ForCausalLM")
    assert (
        report["aliases"] == report["parameters"]
    )  # tied embeddings are one parameter under two names, once in memory


def test_every_tensor_is_what_the_checkpoint_has(owner: Owner, kind: str) -> None:
    weights = attach(owner.run_dirs[kind])
    stored = on_disk(weights)
    for name, tensor in weights.named_tensors():
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
        assert tensor.dtype == (torch.float32 if name.endswith("A_log") else torch.bfloat16)
    left = {name for name in stored if name not in weights.tensors}
    assert left <= set(weights.frozen)
    assert list(weights.tensors) == sorted(weights.tensors)


def test_what_is_frozen_and_what_is_padding(owner: Owner) -> None:
    text, vision = attach(owner.run_dirs["text"]), attach(owner.run_dirs["vision"])
    assert text.frozen == [] and text.server_info["padding"] == []
    assert vision.frozen and all(name.startswith(("visual.", "model.visual.")) for name in vision.frozen)
    assert vision.tensors.keys() == text.tensors.keys()
    padded = attach(owner.run_dirs["padded"])
    assert padded.frozen == ["mtp.fc.weight"]
    assert sorted(padded.server_info["padding"]) == [
        ["lm_head.weight", 1000, 24],
        ["model.embed_tokens.weight", 1000, 24],
    ]
    assert "lm_head.weight" not in attach(owner.run_dirs["tied"]).tensors


def test_each_parameter_is_shared_both_ways(owner: Owner, kind: str) -> None:
    """Written here, seen in vLLM's process; put back, as before there; written there, seen here."""
    weights, index = attach(owner.run_dirs[kind]), owner.index(kind)
    places: dict[str, list[str]] = {}
    for piece in ask(owner.run_dirs[kind], "describe")[0]["slices"]:
        places.setdefault(piece["param"], []).append(piece["name"])
    assert sorted(name for names in places.values() for name in names) == list(weights.tensors)
    for param, names in places.items():
        before = owner.ask(read=[index, param])
        kept = {name: weights.tensors[name].clone() for name in names}
        for name in names:
            weights.tensors[name].fill_(0.5)
            assert owner.ask(read=[index, param]) != before, name
            weights.tensors[name].copy_(kept[name])
            assert owner.ask(read=[index, param]) == before, name
        owner.ask(fill=[index, param, 0.25])
        for name in names:
            assert bool((weights.tensors[name] == 0.25).all()), name
            weights.tensors[name].copy_(kept[name])


def test_header_record_and_state_lie_with_the_owner(owner: Owner) -> None:
    one, other = attach(owner.run_dirs["tied"]), attach(owner.run_dirs["tied"])
    assert read_header(owner.run_dirs["tied"]) == {
        "lineage": one.header.lineage,
        "version": 0,
        "state": "CLEAN",
        "fence": 0,
    }
    assert not one.state.any() and one.record.read() is None
    one.record.write({"version": 1, "jobs": ["a"]})
    one.header.begin(one.header.fence)
    one.state[-1] = 7
    assert read_header(owner.run_dirs["tied"])["state"] == "APPLYING"
    one.header.finish(1)
    assert read_header(owner.run_dirs["tied"]) == {
        "lineage": one.header.lineage,
        "version": 1,
        "state": "CLEAN",
        "fence": 0,
    }
    assert other.record.read() == {"version": 1, "jobs": ["a"]} and other.state[-1] == 7
    one.state[-1] = 0


def test_lineages_differ(owner: Owner) -> None:
    assert len({read_header(run_dir)["lineage"] for run_dir in owner.run_dirs.values()}) == len(owner.run_dirs)


def test_built_model_has_the_checkpoint_s_answers(owner: Owner, kind: str) -> None:
    """On the views, transformers computes to the bit what it computes from the files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = attach(owner.run_dirs[kind])
    model = weights.build_model()
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights.tensors[name].data_ptr() and parameter.requires_grad, name
    config = AutoConfig.from_pretrained(weights.model_path).get_text_config()
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stored = on_disk(weights)
    plain.load_state_dict(
        {n: stored[n].to(plain.state_dict()[n].dtype) for n in weights.tensors}, strict=kind != "tied"
    )
    plain.tie_weights()
    ids = torch.arange(20).reshape(1, 20) * 37 % 1000
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_weights_may_change_inside_backward(owner: Owner) -> None:
    """gate_proj and up_proj lie in one parameter of vLLM's: updating one must not spoil the other's backward."""
    weights = attach(owner.run_dirs["text"])
    kept = {name: tensor.clone() for name, tensor in weights.named_tensors()}
    model = weights.build_model()
    updated = []

    def update(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.add_(0)
        updated.append(parameter)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    ids = torch.arange(12).reshape(1, 12)
    model(ids, labels=ids).loss.backward()
    assert len(updated) == len(weights.tensors)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.named_tensors())


def test_swapped_slices_differ_from_the_checkpoint(owner: Owner) -> None:
    weights = attach(owner.run_dirs["text"])
    spot_check(weights.model_path, weights.tensors)
    for one, other in swaps(weights):
        tensors = weights.tensors | {one: weights.tensors[other], other: weights.tensors[one]}
        with pytest.raises(AttachError, match=f"{re.escape(min(one, other))} .*differs from"):
            spot_check(weights.model_path, tensors)


def swaps(weights: AttachedWeights) -> list[tuple[str, str]]:
    """Pairs that a wrong mapping could exchange without any shape noticing."""
    found = []
    for one, other in (("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("in_proj_b", "in_proj_a")):
        found += [(name, name.replace(one, other)) for name in weights.tensors if one in name]
    assert len(found) == 8
    return [*found, ("lm_head.weight", "model.embed_tokens.weight")]


def test_a_model_that_does_not_fit_is_refused_by_name(owner: Owner) -> None:
    weights = attach(owner.run_dirs["text"])
    name = "model.layers.0.mlp.up_proj.weight"
    without = {n: t for n, t in weights.tensors.items() if n != name}
    with pytest.raises(AttachError, match=f"no weights for {name}"):
        bind.build_model(weights.model_path, without)
    with pytest.raises(AttachError, match=r"has no model\.surplus"):
        bind.build_model(weights.model_path, weights.tensors | {"model.surplus": torch.zeros(1)})
    with pytest.raises(AttachError, match=rf"{name} is \(384, 128\) in transformers, \(383, 128\)"):
        bind.build_model(weights.model_path, weights.tensors | {name: weights.tensors[name][1:]})
    with pytest.raises(AttachError, match=r"holds no model\.surplus"):
        surplus = weights.tensors | {"model.surplus": torch.zeros(1)}
        spot_check(weights.model_path, surplus)


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00\x00\x00\x03abc", b"\xff" * 64, b"\x00\x00\x00\x01\xc0", unix_socket.pack({"op": 1})]
)
def test_garbage_on_the_socket_leaves_it_answering(owner: Owner, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(owner.run_dirs["text"] / "weights.sock"))
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # it hung up on what it had not read
            while sock.recv(4096):
                pass
    assert read_header(owner.run_dirs["text"])["state"] == "CLEAN"


Change = Callable[[dict[str, Any]], object]
UP = "model.layers.0.mlp.up_proj.weight"


def piece(info: dict[str, Any], name: str) -> dict[str, Any]:
    """The slice of tensor `name` in a server's description."""
    return next(found for found in info["slices"] if found["name"] == name)


UNFIT: dict[str, tuple[Change, str]] = {
    "old vLLM": (lambda i: i["versions"].update(vllm="0.25.3"), r"vLLM 0\.25\.3; supported are 0\.26"),
    "new vLLM": (lambda i: i["versions"].update(vllm="0.34.0"), r"vLLM 0\.34\.0; supported are 0\.26"),
    "other PID namespace": (lambda i: i.update(pid=1), "PID namespace"),
    "fp16": (lambda i: i.update(dtype="float16"), "--dtype bfloat16"),
    "rows twice": (lambda i: piece(i, UP).update(start=0), "gate_up_proj.weight: row 0 belongs to two tensors"),
    "beyond the end": (lambda i: piece(i, UP).update(start=400), f"does not hold {UP}"),
    "named twice": (lambda i: piece(i, UP.replace("up", "gate")).update(name=UP), f"{UP} is mapped twice"),
    "not shared": (lambda i: i["parameters"].pop("model.norm.weight"), "model.norm.weight: the server shares no"),
    "not mapped": (lambda i: i["slices"].remove(piece(i, UP)), f"no weights for {UP}"),
    "A_log in bf16": (lambda i: i["parameters"]["model.layers.0.linear_attn.A_log"].update(dtype="bfloat16"),
                      "linear_attn.A_log is torch.bfloat16, not torch.float32"),
    "swapped": (lambda i: (piece(i, UP).update(start=0), piece(i, UP.replace("up", "gate")).update(start=384)),
                "gate_proj.weight .*differs from"),
    "another lineage": (lambda i: i.update(lineage="0" * 32), "of lineage"),
    "another memory": (lambda i: i["memory"].update(kind="rdma"), "'rdma'"),
    "memory gone": (lambda i: i["memory"].update(path="/proc/1/fd/none"), "same machine"),
    "memory of another size": (lambda i: i["memory"].update(bytes=5), "not its memory"),
    "model elsewhere": (lambda i: i.update(model="nobody/nothing"), "nobody/nothing is neither a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_server_that_does_not_fit_is_refused(owner: Owner, tmp_path: Path, case: str) -> None:
    """Attaching to the real memory by a description in which one thing is wrong."""
    change, message = UNFIT[case]
    info = ask(owner.run_dirs["text"], "describe")[0] | {"pid": os.getpid()}
    change(info)
    service = WeightService(tmp_path, {"describe": lambda: info})
    try:
        with pytest.raises(TandemError, match=message):
            attach(tmp_path).build_model()
    finally:
        service.close()


def test_memory_is_not_reachable_by_name(owner: Owner) -> None:
    info = ask(owner.run_dirs["text"], "describe")[0]["memory"]
    assert os.readlink(info["path"]).endswith("(deleted)")  # a memfd: no name in /dev/shm, gone with its last process
    assert os.stat(info["path"]).st_mode & 0o777 == 0o600
    with pytest.raises(PermissionError), open(info["path"], "r+b") as file:  # sealed: it cannot shrink under the server
        file.truncate(0)


def test_vllm_s_own_ways_of_sending_weights_are_refused(owner: Owner) -> None:
    said = owner.ask(transfer=0)
    assert len(said) == 6 and all("shared and trained in place" in answer for answer in said)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--dtype float32": ({"dtype": "float32"}, {}),
    "--decode-context-parallel-size 2": ({}, {"parallel_config.decode_context_parallel_size": 2}),
    "--enable-expert-parallel": ({}, {"parallel_config.enable_expert_parallel": True}),
    "--pipeline-parallel-size 2": ({}, {"parallel_config.pipeline_parallel_size": 2}),
    "--data-parallel-size 2": ({}, {"parallel_config.data_parallel_size": 2}),
    "--quantization fp8": ({}, {"model_config.quantization": "fp8"}),
    "--hf-overrides": ({"hf_overrides": {"rope_theta": 1e6}}, {}),
    "--enable-lora": ({"enable_lora": True}, {}),
    "--load-format pt": ({"load_format": "pt"}, {}),
    "--enable-sleep-mode": ({}, {"model_config.enable_sleep_mode": True}),
    "--compilation-config with max_autotune": (
        {"compilation_config": {"inductor_compile_config": {"max_autotune": True}}, "enforce_eager": False},
        {},
    ),
    "--cpu-offload-gb 1": ({"cpu_offload_gb": 1}, {}),
    "--offload-group-size 4": ({"offload_group_size": 4}, {}),
    "--enable-cumem-allocator": ({}, {"model_config.enable_cumem_allocator": True}),
    "--kv-offloading-size) with OffloadingConnector": ({"kv_offloading_size": 1.0}, {}),
    "--kv-transfer-config (or --kv-offloading-size) with Ex": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        {},
    ),
    "--calculate-kv-scales": ({}, {"cache_config.calculate_kv_scales": True}),
}


@pytest.mark.parametrize("flag", CONFIGS)
def test_flags_that_break_sharing_are_refused_by_name(owner: Owner, flag: str) -> None:
    """On vLLM's own configuration; what it refuses to build on a CPU is set on the finished object."""
    options, changes = CONFIGS[flag]
    message = owner.ask(config={"model": str(owner.models["text"]), **options}, set=changes)
    assert message is not None and flag in message and message.count(";") == 0


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_allocators_that_cuda_ipc_cannot_share_are_refused(owner: Owner, variable: str) -> None:
    plain = {"model": str(owner.models["text"])}
    for setting in (
        "expandable_segments:True",
        "max_split_size_mb:20, expandable_segments:true",
        "backend:cudaMallocAsync",
    ):
        message = owner.ask(config=plain, device="cuda", environment={variable: setting})
        assert message is not None and f"{variable}={setting}" in message
    assert owner.ask(config=plain, device="cuda", environment={variable: "expandable_segments:False"}) is None


def test_kernels_that_may_rearrange_experts_are_refused_on_a_gpu(
    owner: Owner, architecture: Callable[[str], Path]
) -> None:
    """On vLLM's own configuration: what reached it by a file, or what it would choose by itself."""
    mixture = {"model": str(architecture("qwen3_moe"))}
    backend = "kernel_config.moe_backend"
    for name in ("auto", "flashinfer_trtllm"):
        message = owner.ask(config=mixture, device="cuda", set={backend: name})
        assert message is not None and f"--moe-backend {name} may rearrange" in message and "use triton" in message
        assert owner.ask(config={"model": str(owner.models["text"])}, device="cuda", set={backend: name}) is None
        assert owner.ask(config=mixture, set={backend: name}) is None
    assert owner.ask(config=mixture, device="cuda", set={backend: "triton"}) is None


def test_freezing_compiled_weights_is_refused(owner: Owner) -> None:
    message = owner.ask(config={"model": str(owner.models["text"])}, environment={"TORCHINDUCTOR_FREEZING": "1"})
    assert message is not None and "TORCHINDUCTOR_FREEZING=1" in message


def test_a_plain_configuration_is_accepted(owner: Owner) -> None:
    assert owner.ask(config={"model": str(owner.models["text"])}) is None


def test_a_killed_owner_leaves_the_memory_to_its_readers(owner: Owner) -> None:
    """The last test of this file. What a trainer has open stays readable; attaching anew says what is wrong."""
    weights = attach(owner.run_dirs["text"])
    lineage = weights.header.lineage
    owner.process.send_signal(signal.SIGKILL)
    owner.process.wait()
    assert weights.header.lineage == lineage and all(bool(t.isfinite().all()) for t in weights.tensors.values())
    with pytest.raises(unix_socket.WireError, match="tandem serve"):
        attach(owner.run_dirs["text"])
