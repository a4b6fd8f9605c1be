"""Whether the memory that a trace counts for a layer is what a GPU takes for it, at published sizes.

    python benchmarks/layer_memory.py --out results
    python benchmarks/layer_memory.py --models tiny-llama --out results     # on a CPU: only that it works

Two layers of each model (all of its own sizes but the vocabulary), fused as for training, on a row of `--tokens`. Of
the first one: bytes a token that autograd keeps, and the peak of its backward pass, as torch's allocator says, beside
what `worker.model.layer_trace` counted. Parameters' gradients are there before, so that they are not counted.
Must not know: servers, queues. Invariant: OUT/layer_memory.json is whole after every model.
"""

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from agreement import draw_weights
from record import OutOfTime, Part, Record, Until
from shapes import OTHERS, text_facts

from worker.model import attention, fuse
from worker.model.fused_parts import STAND_INS
from worker.model.inputs import NO_MASKS, packing_of
from worker.model.layer_trace import trace
from worker.model.layers import layers_of
from worker.shared_weights.bind import compute_buffers, on_meta
from worker.utils import torch_setup

WORDS = 1024
"""Of the vocabulary here."""
LAYERS = 2
WITHIN = 0.05


def small(size: str, folder: Path) -> Path:
    """A directory with the configuration of `size`, of few layers and words."""
    from transformers import CONFIG_MAPPING

    facts = text_facts(size) | {"num_hidden_layers": LAYERS, "vocab_size": WORDS, "pad_token_id": 0}
    CONFIG_MAPPING[facts["model_type"]](**facts).save_pretrained(folder)
    return folder


def on_device(folder: Path, device: torch.device) -> Any:
    """The model with random weights, fused, every layer keeping its activations."""
    model = on_meta(folder)
    compute_buffers(model, device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, torch.nn.Parameter(torch.empty_like(parameter, device=device)))
    draw_weights(model)
    fuse(model.train(), lambda tokens: LAYERS, None if device.type == "cuda" else STAND_INS)
    return model


def taken(model: Any, tokens: int, device: torch.device) -> tuple[float, float]:
    """(kept, peak of backward beside it) of the first layer, in bytes a token; 0 on a CPU, which does not say."""
    calls: list[Any] = []
    layer = layers_of(model)[0]
    hook = layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    inputs = {"position_ids": torch.arange(tokens, device=device)[None], "attention_mask": NO_MASKS}
    with torch.no_grad():
        model.base_model(input_ids=ids, packing=packing_of([tokens]).to(device), use_cache=False, **inputs)
    hook.remove()
    _, args, kwargs = calls[0]
    found = (0.0, 0.0)
    for _ in range(2):  # the first time kernels are loaded, and gradients come to be
        hidden = args[0].detach().clone().requires_grad_()
        before = allocated(device) - hidden.nbytes
        out = layer(hidden, *args[1:], **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        outer = torch.empty_like(out).normal_()
        kept = allocated(device) - before - out.nbytes - outer.nbytes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        out.backward(outer)
        peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0) - before - out.nbytes - kept
        found = kept / tokens, peak / tokens
        del (
            hidden,
            out,
            outer,
        )  # the graph of `out` holds what went in, with its gradient: the next turn would miss both
    return found


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(part: Part, size: str, tokens: int, device: torch.device) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        folder = small(size, Path(name))
        costs = trace(on_meta(folder))
        first = costs.kinds[costs.layers[0]]
        part["attention"] = attention.NAME
        part["counted"] = {"kept": first.saved, "beside": first.extra}
        kept, beside = taken(on_device(folder, device), tokens, device)
    part["taken"] = {"kept": kept, "beside": beside}
    if device.type == "cuda":
        ratio = (first.saved + first.extra) / (kept + beside)
        part["counted_over_taken"] = ratio
        # What autograd makes of parameters' gradients before they are added up is in `beside`, and not in the count.
        part["largest_gradient_a_token"] = 2 * max(one.numel() for one in _matrices(costs)) / tokens
        part.check(f"what is kept is counted within {WITHIN:.0%}", abs(first.saved / kept - 1) <= WITHIN)


def _matrices(costs: Any) -> list[Any]:
    return [torch.empty(shape, device="meta") for shape in costs.kinds[costs.layers[0]].shapes.values()]


@click.command()
@click.option("--models", default=",".join(OTHERS[:-1]), show_default=True, help="Comma-separated.")
@click.option("--tokens", default=8192, show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def main(models: str, tokens: int, seconds: float, out: Path) -> None:
    """Compare what is counted with what is taken; exit code 1 where they are apart."""
    if unknown := set(models.split(",")) - set(OTHERS):
        raise click.UsageError(f"--models: unknown {', '.join(sorted(unknown))}; choose from {', '.join(OTHERS)}")
    outputs.folder(out)
    torch_setup.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    until = Until(seconds)
    record = Record(out / "layer_memory.json")
    try:
        for size in models.split(","):
            record.part(size, lambda part, size=size: measure(part, size, tokens, device))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    until.disarm()
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


if __name__ == "__main__":
    main()
