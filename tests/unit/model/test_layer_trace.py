"""What is counted without data is what a run with data takes: bytes that autograd keeps, the peak of a backward pass;
and what the plan makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from worker.apollo import state_bytes
from worker.memory.activations import extra, factors, saved
from worker.memory.graphs import NO_GRAPHS, graphs_beside
from worker.memory.model_config import ATTENTION, ConfigError, TextConfig
from worker.memory.optimizer_memory import state_bytes as planned_state_bytes
from worker.memory.planner import make_plan, weight_bytes
from worker.memory.traced_sizes import TracedSizes, read_sizes
from worker.model import layer_trace
from worker.model.fused_parts import STAND_INS, fuse_parts
from worker.model.layer_trace import measure, sizes_of, trace
from worker.shared_weights.bind import on_meta

Make = Callable[[str], Path]
CONFIGS = Path(__file__).parents[2] / "data" / "configs"
TOKENS = 512
NAMES = ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "glm4", "cohere", "smollm3"]


def call(model: Any, tokens: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """How `model` calls its first layer on a row of so many tokens."""
    calls = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=next(model.parameters()).device)
        model.model(input_ids=ids, use_cache=False)
    hook.remove()
    (found,) = calls
    return found


def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, **others: Any) -> tuple[Any, None]:
    """Plain, without a mask: [1, heads, T, size] each."""
    k, v = (some.repeat_interleave(q.shape[1] // some.shape[1], 1) for some in (k, v))
    return ((q @ k.transpose(2, 3) * scaling).softmax(-1) @ v).transpose(1, 2).contiguous(), None


def both(folder: Path) -> tuple[Any, Any]:
    """The model without data, and with zeros on the CPU; with the stand-ins, and a plain attention."""
    models = on_meta(folder), on_meta(folder).to_empty(device="cpu")
    from transformers import AttentionInterface

    AttentionInterface.register("plain", attend)
    for model in models:
        model.set_attn_implementation("plain")
        fuse_parts(model, STAND_INS)
    for tensor in [*models[1].parameters(), *models[1].buffers()]:
        torch.nn.init.ones_(tensor.data)
    return models


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_that_are_counted_are_those_that_autograd_keeps(architecture: Make, name: str) -> None:
    meta, real = both(architecture(name))
    counted = measure(*call(meta, TOKENS))[0]
    layer, args, kwargs = call(real, TOKENS)
    apart = [*layer.parameters(), *layer.buffers()]
    apart += [*kwargs["position_embeddings"], *[x for x in kwargs.values() if isinstance(x, torch.Tensor)]]
    kept = {args[0].untyped_storage().data_ptr(): args[0].nbytes}
    hidden = args[0].detach().requires_grad_()
    alive = []  # no address is used a second time

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, *args[1:], **kwargs)
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    taken = sum(size for place, size in kept.items() if place not in known)
    assert counted == pytest.approx(taken, rel=0.01)
    assert taken > TOKENS * 2 * 64 * 8


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_peak_is_that_of_torch_s_own_profiler(architecture: Make, name: str) -> None:
    _, real = both(architecture(name))
    layer, args, kwargs = call(real, TOKENS)
    measure(layer, args, kwargs)
    _, counted, _ = measure(layer, args, kwargs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        hidden = args[0].clone().requires_grad_()
        out = layer(hidden, *args[1:], **kwargs)
        with torch.profiler.record_function("backward begins"):
            pass
        out.backward(torch.ones_like(out))
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
        elif event.name() == "backward begins":
            most = 0
    assert counted == pytest.approx(most - out.nbytes, rel=0.05)


def traced(name: str, folder: Path) -> TracedSizes:
    """Of a published configuration."""
    (folder / "config.json").write_bytes((CONFIGS / "other" / f"{name}.json").read_bytes())
    found = sizes_of(folder)
    assert isinstance(found, TracedSizes)
    return found


def test_a_layer_of_llama_by_hand(tmp_path: Path) -> None:
    sizes = traced("Llama-3.1-8B", tmp_path)
    assert set(sizes.layers) == set(sizes.kinds) == {"LlamaDecoderLayer 1"} and len(sizes.layers) == 32
    (costs,) = sizes.kinds.values()
    hidden, keys, wide, heads = 4096, 1024, 14336, 32
    norms = 2 * (2 * hidden + 2 * hidden + 4)  # each keeps its input, and what is made of it is an input of matrices
    attention = 2 * (hidden + 2 * keys + hidden) + 4 * heads  # q and k rotated, v, the output; a number a head
    assert costs.saved == norms + attention + 3 * 2 * wide
    assert costs.extra == 2 * hidden + 2 * wide  # the stream's gradient, and that of the product
    inputs, outputs = 3 * hidden + wide, hidden + 2 * keys + hidden + 2 * wide + hidden
    assert costs.factors == 2 * (inputs + outputs)
    assert sizes.count() == 8_030_261_248 and not sizes.tied and sizes.exact == 0


def test_a_layer_of_experts_by_hand(tmp_path: Path) -> None:
    """As the arithmetic of a Qwen3.5's mixture counts them (`worker.memory.activations`)."""
    sizes = traced("Qwen3-30B-A3B", tmp_path)
    (costs,) = sizes.kinds.values()
    hidden, wide, taken, count, queries, keys = 2048, 768, 8, 128, 32 * 128, 4 * 128
    experts = taken * (4 * hidden + 8 * wide + 32) + 10 * count
    attention = 2 * (3 * queries + 3 * keys) + 4 * 32
    assert costs.saved == pytest.approx(experts + attention + 2 * (4 * hidden + 4), rel=0.01)
    assert 0.4 * costs.extra < taken * (4 * hidden + 4 * wide) < costs.extra
    assert sizes.stacks() == 48 * count * 3 * hidden * wide
    assert planned_state_bytes(sizes) == state_bytes(list(sizes.parameters().values()))


@pytest.mark.parametrize("size", ["0.8B", "27B"])
def test_the_arithmetic_of_a_qwen_s_attention_is_not_less_than_a_trace(size: str, tmp_path: Path) -> None:
    """Arithmetic that measured peaks bear out counts somewhat more: q before its rotation, gradients apart."""
    config = json.loads((CONFIGS / f"qwen3_5-{size}.json").read_text())
    text = config.get("text_config", config)
    text |= {"layer_types": [ATTENTION] * 2, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    known, found = TextConfig.of(config), trace(on_meta(tmp_path))
    (kind,) = found.kinds
    assert factors(found, kind) == factors(known, ATTENTION)
    whole = sum(saved(known, ATTENTION))
    assert 0.85 * whole <= sum(saved(found, kind)) <= whole
    assert extra(found, kind) <= extra(known, ATTENTION)
    assert found.parameters() == known.parameters() and found.tables() == known.tables()
    assert weight_bytes(found) == weight_bytes(known)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "gemma-3-1b", "OLMo-2-7B"])
def test_the_plan_of_a_traced_model(tmp_path: Path, name: str) -> None:
    sizes = traced(name, tmp_path)
    shapes = list(sizes.parameters().values())
    assert planned_state_bytes(sizes) == state_bytes(shapes)
    assert weight_bytes(sizes) == 2 * sizes.count()
    assert [len(sizes.tables()), sizes.tied] == ([1, True] if name.startswith("gemma") else [2, False])
    burst, streaming = (make_plan(sizes, 8192, way=way, kept=0) for way in ("burst", "streaming"))
    assert streaming.total < burst.total and burst.total > weight_bytes(sizes)
    every = make_plan(sizes, 8192, way="streaming", kept=len(sizes.layers))
    activations = dict(every.rows)[f"activations of {len(sizes.layers)} layers"]
    assert activations == pytest.approx(8192 * sum(sizes.kinds[kind].saved for kind in sizes.layers), abs=10**7)
    assert graphs_beside(sizes, (512,), 10**12, way="burst", by_factors=True) == NO_GRAPHS


def test_what_another_process_says_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = traced("Llama-3.1-8B", tmp_path)
    layer_trace.main(str(tmp_path))
    assert TracedSizes.of(json.loads(capsys.readouterr().out)) == found


@pytest.mark.slow
def test_another_process_says_it(tmp_path: Path) -> None:
    found = traced("gemma-3-1b", tmp_path)
    assert read_sizes(tmp_path / "config.json") == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "says"),
    [({"model_type": "gemma2"}, "wants softcap of its attention"), ({"model_type": "none such"}, "none such")],
)
def test_another_process_says_why_not(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"config\.json: .*{says}"):
        read_sizes(tmp_path / "config.json")
