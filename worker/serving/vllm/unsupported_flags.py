"""The server's flags under which weights cannot be shared, or not soundly, each refused by name before anything else.

vLLM's configuration objects are read here only as plain attributes; checked on 0.26.0 and 0.32.0. Must not know:
sockets, torch.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from producer.errors import TandemError
from worker.serving.expert_kernels import SHARED, rearranged

PARALLEL_SIZES = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""Each must be 1: a rank of tensor parallelism then holds a part of every layer, and each part once."""
LOAD_FORMATS = ("auto", "safetensors", "dummy", "instanttensor", "runai_streamer", "fastsafetensors")
"""Formats that put plain safetensors checkpoints (or random values) into parameters of the server's own."""


class RefusedFlagError(TandemError):
    """The server was started in a way that keeps its weights from being shared and trained."""


def refuse_unshareable(vllm_config: Any, device_type: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise `RefusedFlagError` naming every flag of `vllm_config` (a vLLM VllmConfig) that stands in the way."""
    reasons = [*_parallel(vllm_config.parallel_config), *_model(vllm_config), *_memory(vllm_config)]
    reasons += [*_caches(vllm_config), *_tensor_parallel(vllm_config)]
    reasons += _compiler(vllm_config.compilation_config.inductor_compile_config, device_type, environment)
    if device_type == "cuda":
        reasons += [*_allocator(environment), *_experts(vllm_config)]
    if reasons:
        raise RefusedFlagError("the weights of this server cannot be trained: " + "; ".join(reasons))


def _parallel(config: Any) -> Iterator[str]:
    for flag in PARALLEL_SIZES:
        size = getattr(config, flag, 1)
        if size != 1:
            yield f"--{flag.replace('_', '-')} {size} splits or repeats them over processes: use 1"
    if getattr(config, "enable_expert_parallel", False):
        yield "--enable-expert-parallel puts whole experts on one rank each: serve without it"


def _tensor_parallel(config: Any) -> Iterator[str]:
    """What does not go with weights that are divided over ranks."""
    if config.parallel_config.tensor_parallel_size > 1 and config.speculative_config is not None:
        yield "--speculative-config with --tensor-parallel-size was not tried: serve without one of them"


def _model(config: Any) -> Iterator[str]:
    model = config.model_config
    if model.quantization is not None or config.quant_config is not None:
        yield f"--quantization {model.quantization}: quantized weights cannot be trained in place: serve the bf16 model"
    if str(model.dtype) != "torch.bfloat16":
        yield f"--dtype {str(model.dtype).removeprefix('torch.')}: serve with --dtype bfloat16"
    if getattr(model, "hf_overrides", None):
        yield "--hf-overrides changes the model behind the trainer's back: edit its config.json instead"
    if config.lora_config is not None:
        yield "--enable-lora wraps the layers and serves adapters made for weights that change: serve without it"
    load_format = config.load_config.load_format
    if str(load_format) not in LOAD_FORMATS:
        yield f"--load-format {load_format}: use one of {', '.join(LOAD_FORMATS)}"


def _memory(config: Any) -> Iterator[str]:
    if config.model_config.enable_sleep_mode:
        yield "--enable-sleep-mode frees and remaps the weights' memory: serve without it"
    elif getattr(config.model_config, "enable_cumem_allocator", False):
        yield "--enable-cumem-allocator allocates memory that cannot be shared: serve without it"
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0:
        yield f"--cpu-offload-gb {offload.uva.cpu_offload_gb} keeps weights outside the GPU: use 0"
    if offload.prefetch.offload_group_size > 0:
        yield f"--offload-group-size {offload.prefetch.offload_group_size} keeps weights outside the GPU: use 0"


def _caches(config: Any) -> Iterator[str]:
    """What keeps keys and values, or scales of them, beyond an update."""
    transfer = config.kv_transfer_config
    if transfer is not None:
        yield (
            f"--kv-transfer-config (or --kv-offloading-size) with {transfer.kv_connector} keeps keys and values of"
            " older weights outside vLLM's own cache: serve without it"
        )
    if getattr(config.cache_config, "calculate_kv_scales", False):
        yield "--calculate-kv-scales computes the scales once, for weights that change: serve without it"


def _experts(config: Any) -> Iterator[str]:
    """Kernels that want the experts in another layout; what "auto" chooses depends on the device."""
    backend = getattr(getattr(config, "kernel_config", None), "moe_backend", SHARED[0])
    if getattr(config.model_config, "is_moe", False) and backend not in SHARED:
        yield rearranged(backend)


def _compiler(options: Mapping[str, Any], device_type: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Inductor's freezing folds weights into compiled code; vLLM's CPU runner turns it on with max_autotune."""
    for option in ("freezing", "max_autotune") if device_type == "cpu" else ("freezing",):
        if options.get(option):
            yield f"--compilation-config with {option} folds the weights into compiled code: leave {option} out"
    if environment.get("TORCHINDUCTOR_FREEZING", "0") == "1":
        yield "TORCHINDUCTOR_FREEZING=1 folds the weights into compiled code: unset it"


def _allocator(environment: Mapping[str, str]) -> Iterator[str]:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        options = environment.get(variable, "").replace(" ", "").lower()
        if "expandable_segments:true" in options or "backend:cudamallocasync" in options:
            yield f"{variable}={environment[variable]} allocates memory that CUDA IPC cannot share: unset it"
