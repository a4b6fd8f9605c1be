"""`tandem serve`: what it refuses, by name; what it adds; and that one run directory has one server."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from patience import PATIENCE, until

from worker.serving import launch
from worker.serving.expert_kernels import kernel_options
from worker.serving.refused_options import check_options
from worker.testing.server_process import ServerFailedError, ServerProcess
from worker.utils import unix_socket


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--api-server-count", "2"], "--api-server-count"),
        (["--api_server_count=4"], "--api-server-count"),
        (["-asc", "2"], "--api-server-count"),
        (["--headless"], "--headless"),
        (["--enable-sleep-mode"], "--enable-sleep-mode"),
        (["--quantization", "fp8"], "--quantization"),
        (["-q", "awq"], "--quantization"),
        (["--port", "1234", "-pp", "2"], "--pipeline-parallel-size"),
        (["-tp", "2", "--enable-expert-parallel"], "--enable-expert-parallel"),
        (["-tp", "2", "--decode-context-parallel-size", "2"], "--decode-context-parallel-size"),
        (["--pipeline_parallel_size", "2"], "--pipeline-parallel-size"),
        (["--data-parallel-size", "2"], "--data-parallel-size"),
        (["--data-parallel-rank", "0"], "--data-parallel-rank"),
        (["--cpu-offload-gb", "4"], "--cpu-offload-gb"),
        (["--offload-group-size", "1"], "--offload-group-size"),
        (["--weight-transfer-config.backend", "nccl"], "--weight-transfer-config.backend"),
        (["--worker-extension-cls", "mine.Extension"], "--worker-extension-cls"),
        (["--enable-cumem-allocator"], "--enable-cumem-allocator"),
        (
            ["--kv-transfer-config", '{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}'],
            "--kv-transfer-config",
        ),
        (["--kv-transfer-config.kv_connector", "OffloadingConnector"], "--kv-transfer-config.kv-connector"),
        (["--kv-offloading-size", "8"], "--kv-offloading-size"),
        (["--calculate-kv-scales"], "--calculate-kv-scales"),
    ],
)
def test_options_that_break_sharing_are_refused_by_name(options: list[str], flag: str) -> None:
    with pytest.raises(launch.LaunchError, match=rf"^{flag} cannot be used"):
        check_options(options, {})


@pytest.mark.parametrize(
    "options",
    [
        ["-tp", "1"],
        ["--tensor-parallel-size=2"],
        ["--api-server-count=1", "--cpu-offload-gb", "0", "--offload-group-size=0"],
        ["--port", "8000", "--max-model-len", "512", "--served-model-name", "a", "b"],
        ["--seed", "-1"],
    ],
)
def test_other_options_pass(options: list[str]) -> None:
    check_options(options, {})
    assert launch.with_defaults(options, {}, on_cpu=True)[0][: len(options)] == options


@pytest.mark.parametrize(
    ("variable", "value", "refused"),
    [
        ("VLLM_USE_RUST_FRONTEND", "1", True),
        ("VLLM_USE_RUST_FRONTEND", "0", False),
        ("VLLM_SERVER_DEV_MODE", "1", True),
        ("VLLM_SERVER_DEV_MODE", "0", False),
        ("VLLM_ENABLE_RESPONSES_API_STORE", "1", True),
        ("VLLM_ENABLE_RESPONSES_API_STORE", "0", False),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True", True),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:true", True),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", False),
    ],
)
def test_variables_that_break_sharing_are_refused_by_name(variable: str, value: str, refused: bool) -> None:
    if not refused:
        return check_options([], {variable: value})
    with pytest.raises(launch.LaunchError, match=variable):
        check_options([], {variable: value})


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}'], "mtp"),
        (["-sc", '{"model": "some/drafter", "num_speculative_tokens": 2}'], "a draft model"),
        (["--speculative-config.method", "eagle3"], "eagle3"),
        (["--spec-method=mtp", "--spec-tokens", "2"], "mtp"),
        (["--spec-model", "some/drafter"], "a draft model"),
        (["--speculative-config", '{"method": "ngram"}'], None),
        (["--spec-method", "suffix"], None),
        ([], None),
    ],
)
def test_a_drafter_that_does_not_learn_is_said(options: list[str], method: str | None) -> None:
    given, notes = launch.with_defaults(options, {}, on_cpu=False)
    said = [note for note in notes if "drafter" in note]
    assert given[: len(options)] == options, "it is not refused"
    assert len(said) == (method is not None) and all(f"({method}) does not learn" in note for note in said)


def test_what_the_user_said_is_not_said_again() -> None:
    options, notes = launch.with_defaults(["--host", "0.0.0.0"], {"VLLM_CPU_KVCACHE_SPACE": "4"}, on_cpu=True)
    assert options.count("--host") == 1
    assert "--enforce-eager" in options
    assert not any("127.0.0.1" in note or "KV cache" in note for note in notes)
    options, _ = launch.with_defaults(["--dtype=float32", "-O3"], {}, on_cpu=True)
    assert "--enforce-eager" not in options
    assert options.count("--dtype=float32") + options.count("--dtype") == 1


def test_defaults() -> None:
    options, notes = launch.with_defaults([], {}, on_cpu=False)
    assert options[options.index("--host") + 1] == "127.0.0.1"
    assert any("127.0.0.1" in note for note in notes)
    assert json.loads(options[options.index("--weight-transfer-config") + 1]) == {"backend": "tandem"}
    assert "--dtype" not in options
    on_cpu = launch.with_defaults([], {}, on_cpu=True)[0]
    assert on_cpu[on_cpu.index("--dtype") + 1] == "bfloat16"


def test_the_environment_keeps_the_users_plugins_and_adds_ours() -> None:
    assert launch.allowed_plugins("mine, other") == ["mine", "other", "tandem"]
    assert launch.allowed_plugins("") == ["tandem"]
    assert launch.allowed_plugins("tandem,x") == ["tandem", "x"]
    discovered = launch.allowed_plugins(None)
    assert discovered.count("tandem") == 1
    assert "lora_filesystem_resolver" in discovered  # vLLM's own, loaded when the variable is unset
    environment = launch.build_environment({"A": "b"}, Path("/run/x"), [], on_cpu=True)
    assert (environment["A"], environment["TANDEM_RUN_DIR"], environment["TANDEM_SERVE"]) == ("b", "/run/x", "1")
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_TARGET_DEVICE" not in launch.build_environment(
        {"VLLM_TARGET_DEVICE": "cpu"}, Path("/"), [], on_cpu=True
    )
    said = launch.build_environment({}, Path("/run/x"), ["--kv-cache-memory-bytes", "5G"], on_cpu=True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in said


def test_launching_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, worker.serving.launch; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def serve(*arguments: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker.cli", "serve", *arguments, "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def of_experts(folder: Path, **fields: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_a_mixture_s_kernel_is_chosen_on_a_gpu(tmp_path: Path) -> None:
    """One that leaves the experts' weights as they are; for nobody who said another that does, nor a dense model."""
    mixture = of_experts(tmp_path / "mixture", model_type="qwen3_moe", num_experts=128)
    dense = of_experts(tmp_path / "dense", model_type="llama")
    triton = ["--moe-backend", "triton"]
    found = kernel_options(mixture, ["--port", "80"], on_cpu=False)
    assert found.options == triton and "rearrange" in found.notes[0]
    assert kernel_options(mixture, ["--moe-backend", "auto"], on_cpu=False).options == triton
    for model, options, on_cpu in [
        (mixture, [], True),
        (dense, [], False),
        (str(tmp_path / "none"), [], False),
        (mixture, ["--moe_backend=batched-triton"], False),
        (mixture, ["--kernel-config", '{"moe_backend": "triton"}'], False),
        (mixture, ["--kernel-config.moe_backend", "triton"], False),
    ]:
        assert kernel_options(model, options, on_cpu) == ([], [])
    (tmp_path / "vllm.yaml").write_text("port: 80\nmoe-backend: triton\n")
    assert kernel_options(mixture, ["--config", str(tmp_path / "vllm.yaml")], on_cpu=False) == ([], [])


@pytest.mark.parametrize(
    "options",
    [
        ["--moe-backend", "flashinfer_cutlass"],
        ["--moe_backend=FlashInfer-TRTLLM"],
        ["--kernel-config", '{"moe_backend": "aiter"}'],
        ["--kernel-config.moe_backend", "deep_gemm"],
    ],
)
def test_kernels_that_rearrange_the_experts_are_refused(options: list[str]) -> None:
    with pytest.raises(launch.LaunchError, match=r"^--moe-backend cannot be used .* may rearrange .*: use triton$"):
        check_options(options, {})


def test_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = serve("model", "--enable-sleep-mode", run_dir=tmp_path / "run")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: --enable-sleep-mode cannot be used")
    assert len(result.stderr.splitlines()) == 1
    assert "MODEL comes first" in serve("--port", "80", "model", run_dir=tmp_path / "run").stderr


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "12GB", ""])
def test_a_trainer_memory_that_is_no_size_is_refused(text: str, tmp_path: Path) -> None:
    result = serve("model", f"--trainer-memory={text}", run_dir=tmp_path / "run")
    assert result.returncode != 0
    assert "is neither a number of GB nor auto" in result.stderr


@pytest.mark.skipif(not launch.is_cpu_build(), reason="on a GPU this would start a server")
def test_trainer_memory_is_for_gpus(tmp_path: Path) -> None:
    result = serve("model", "--trainer-memory", "5", run_dir=tmp_path / "run")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: --trainer-memory is for GPUs")


def test_a_run_directory_has_one_server(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    holder = (
        "import sys; from pathlib import Path; from worker.utils import unix_socket;"
        "from worker.serving.launch import lock;"
        "run_dir = Path(sys.argv[1]); unix_socket.prepare_run_dir(run_dir); lock(run_dir, 'first/model');"
        "print('ready', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    result = serve("second/model", run_dir=run_dir)
    assert result.returncode == 1
    assert f"is in use by process {first.pid} serving first/model" in result.stderr
    first.kill()
    first.communicate()
    descriptor_before = len(os.listdir("/proc/self/fd"))
    launch.lock(run_dir, "third/model")  # the kernel gave it back
    (descriptor,) = [fd for fd in os.listdir("/proc/self/fd") if _points_to(fd, run_dir / "server.lock")]
    os.close(int(descriptor))
    assert len(os.listdir("/proc/self/fd")) == descriptor_before


def test_a_process_of_somebody_else_that_holds_a_socket_is_named(tmp_path: Path) -> None:
    run_dir = unix_socket.prepare_run_dir(tmp_path / "run")
    with unix_socket.bind(str(run_dir / "weights.sock")):
        result = serve("model", run_dir=run_dir)
    assert result.returncode == 1
    assert f"process {os.getpid()} still holds {run_dir}/weights.sock and was not started by" in result.stderr


ENDING = """
import ctypes, sys, threading, time
from pathlib import Path
from worker.utils import unix_socket
held = unix_socket.bind(sys.argv[1])
held.listen()
def hold():
    print("ready", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    held.close()
threading.Thread(target=hold).start()
ctypes.CDLL(None).pthread_exit(None)  # the first thread ends: /proc has no command line of the process any more
"""


def test_a_process_that_is_ending_and_still_holds_a_socket_is_waited_for(tmp_path: Path) -> None:
    run_dir, gone = unix_socket.prepare_run_dir(tmp_path / "run"), tmp_path / "gone"
    holding = [sys.executable, "-c", ENDING, str(run_dir / "weights.sock"), str(gone)]
    code = "import sys; from pathlib import Path; from worker.serving.launch import lock; lock(Path(sys.argv[1]), 'm')"
    with ExitStack() as stack:
        ending = stack.enter_context(subprocess.Popen(holding, stdout=subprocess.PIPE, text=True))
        stack.callback(gone.touch)
        assert ending.stdout is not None and ending.stdout.readline() == "ready\n"
        until(lambda: not Path(f"/proc/{ending.pid}/cmdline").read_bytes(), "have no command line")
        taking = stack.enter_context(subprocess.Popen([sys.executable, "-c", code, str(run_dir)]))
        with pytest.raises(subprocess.TimeoutExpired):
            taking.wait(3)
        gone.touch()
        assert taking.wait(PATIENCE) == 0


def _points_to(descriptor: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
    except OSError:
        return False


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServerFailedError, match="ended with exit code 1") as failure:
        ServerProcess(tmp_path / "no-such-model", tmp_path / "run", extra=["--enable-sleep-mode"])
    assert "--enable-sleep-mode cannot be used" in str(failure.value)
