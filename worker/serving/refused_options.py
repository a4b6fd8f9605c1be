"""vLLM's options and variables that cannot be used with `tandem serve`, and why.

They are refused by name before anything is loaded. What vLLM makes of configuration files and abbreviations is checked
again beside the weights (serving/vllm/unsupported_flags.py). Must not know: vLLM, torch.
"""

from collections.abc import Mapping, Sequence

from worker.serving.expert_kernels import refused_backend
from worker.serving.vllm_flags import LaunchError, json_config, parse_flags

_ONE_RANK = "of vLLM's ways to use several GPUs, only --tensor-parallel-size is known to the trainer"
_ONE_API = "the control socket and the versions in answers need exactly one API process"
_OFFLOADED = "offloaded weights are not where the trainer would write"
_ALLOCATOR = "its allocator moves the weights, and memory from it cannot be shared"
_KEPT_ELSEWHERE = (
    "keys and values that are kept outside vLLM's own cache outlive an update, and answers would be made from those of"
    " older weights"
)
REFUSED: dict[str, tuple[str, str | None]] = {
    "--api-server-count": (_ONE_API, "1"),
    "--headless": (_ONE_API, None),
    "--grpc": (_ONE_API, None),
    "--grpc-port": (_ONE_API, None),
    "--enable-sleep-mode": (_ALLOCATOR, None),
    "--enable-cumem-allocator": (_ALLOCATOR, None),
    "--quantization": ("quantized weights cannot be trained in place", None),
    "--pipeline-parallel-size": (_ONE_RANK, "1"),
    "--data-parallel-size": (_ONE_RANK, "1"),
    "--nnodes": (_ONE_RANK, "1"),
    "--data-parallel-rank": (_ONE_RANK, None),
    "--data-parallel-start-rank": (_ONE_RANK, None),
    "--data-parallel-external-lb": (_ONE_RANK, None),
    "--data-parallel-hybrid-lb": (_ONE_RANK, None),
    "--data-parallel-multi-port-external-lb": (_ONE_RANK, None),
    "--enable-elastic-ep": (_ONE_RANK, None),
    "--enable-expert-parallel": (_ONE_RANK, None),
    "--prefill-context-parallel-size": (_ONE_RANK, "1"),
    "--decode-context-parallel-size": (_ONE_RANK, "1"),
    "--cpu-offload-gb": (_OFFLOADED, "0"),
    "--offload-group-size": (_OFFLOADED, "0"),
    "--kv-transfer-config": (_KEPT_ELSEWHERE, None),
    "--kv-offloading-size": (_KEPT_ELSEWHERE, None),
    "--calculate-kv-scales": ("the scales are computed once, and the weights that they are for change", None),
    "--weight-transfer-config": ("tandem serve sets it to its own backend", None),
    "--worker-extension-cls": ("tandem serve sets it to its own class", None),
}
"""Flag -> why not, and the value that does no harm."""
REFUSED_VARIABLES = {
    "VLLM_USE_RUST_FRONTEND": _ONE_API,
    "VLLM_SERVER_DEV_MODE": "it lets any HTTP client resume the server while an update is being written",
    "VLLM_ENABLE_RESPONSES_API_STORE": (
        "answers that are made in the background and fetched later say no version, and would survive torn weights"
    ),
}
"""Environment variable -> why it may not be on."""
WITHOUT_DRAFTER = ("ngram", "[ngram]", "ngram_gpu", "suffix")
"""Methods of speculative decoding that guess from the text alone: they have no weights that could fall behind."""


def check_options(options: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise LaunchError naming the first option or variable that breaks sharing or control."""
    given = parse_flags(options)
    if reason := refused_backend(given):
        raise LaunchError(reason)
    for flag, values in given.items():
        # --some-config.field is vLLM's way to write one field of --some-config.
        reason, harmless = REFUSED.get(flag.partition(".")[0], (None, None))
        if reason and (not values or any(value != harmless for value in values)):
            raise LaunchError(f"{flag} cannot be used with tandem serve: {reason}")
    for variable, reason in REFUSED_VARIABLES.items():
        if environment.get(variable, "0") not in ("", "0"):
            raise LaunchError(f"{variable} cannot be used with tandem serve: {reason}. Unset it")
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        setting = environment.get(variable, "").replace(" ", "").lower()
        if "expandable_segments:true" in setting:
            raise LaunchError(
                f"{variable}={environment[variable]} cannot be used with tandem serve: memory of expandable segments "
                "cannot be shared by CUDA IPC. Set expandable_segments:False"
            )


def stale_drafter(options: Sequence[str]) -> str | None:
    """The method of speculative decoding in `options` whose drafter training leaves as it is; None without one."""
    given = parse_flags(options)
    named = given.get("--spec-method", []) + given.get("--speculative-config.method", [])
    configs = [json_config(text) for text in given.get("--speculative-config", [])]
    named += [str(config["method"]) for config in configs if "method" in config]
    asked = any(flag.partition(".")[0] in ("--speculative-config", "--spec-model", "--spec-method") for flag in given)
    method = named[-1] if named else "a draft model"
    return method if asked and method not in WITHOUT_DRAFTER else None
