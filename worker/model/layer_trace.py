"""What training a model takes, counted on one layer of each kind, without data: the sizes that the memory plan asks.

    sizes = sizes_of(folder)                     # a Qwen3.5's by arithmetic, else traced
    python -m worker.model.layer_trace FOLDER    # the same in JSON, for those who may not import torch

transformers builds the model on the meta device, with the kernels' stand-ins (`worker.model.stand_ins`). One layer of
each kind runs forward and backward there: autograd says what it keeps, and every storage that appears and goes is
counted. All of it is proportional to the tokens, but for the gradients of parameters, which two lengths tell apart.

It shows as well what packed rows would lose, and this is refused by name: a layer that mixes tokens elsewhere than in
transformers' attention, whose attention is not told where sequences begin, or whose window reaches only a mask.

Must not know: the optimizer, the server.
Invariant: what is counted for a layer follows from its class, its shapes and the kernels alone.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from producer.errors import TandemError
from worker.memory.model_config import OtherModelError, TextConfig
from worker.memory.traced_sizes import LayerCosts, Sizes, TracedSizes
from worker.model import attention
from worker.model.experts import ask_for_groups
from worker.model.fused_parts import STAND_INS, fuse_parts
from worker.model.inputs import NO_MASKS, packing_of
from worker.model.layers import kinds_of, layers_of, types_of
from worker.model.model_error import ModelError
from worker.shared_weights.bind import on_meta, without_dropout
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.utils.stacks import is_stack

NAME = "tandem_traced"
TOKENS = 1 << 17
"""Of the shorter of two rows: so many that no parameter's gradient decides where the peak is."""
MIXERS = (nn.Conv1d, nn.RNNBase)
"""What mixes tokens beside attention."""


def sizes_of(folder: Path) -> Sizes:
    """Of the model whose config.json is in `folder`. Raises ConfigError, or another TandemError with the
    reason."""
    try:
        return TextConfig.read(folder / "config.json")
    except OtherModelError:
        return trace(on_meta(folder))


def trace(model: Any) -> TracedSizes:
    """Of `model`, a causal language model on the meta device, which is not to be used any more. Raises ModelError,
    AttentionError, ExpertsError."""
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    refuse_unpackable(model)
    without_dropout(model).train()
    fuse_parts(model, STAND_INS)
    if any(is_stack(shape) for shape in named.values()):
        ask_for_groups(model)
    layers = list(layers_of(model))
    kinds = _kinds(model)
    costs = {kind: _costs(*call) for kind, call in _calls(model, layers, kinds).items()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = [name for name, parameter in model.named_parameters() if parameter is table or parameter is head]
    exact = [name for name in named if name.rpartition(".")[2] in FLOAT32_PARAMETERS]
    return TracedSizes(
        hidden=table.shape[1],
        vocab=head.shape[0],
        tied=table is head,
        layers=tuple(kinds),
        kinds=costs,
        named=named,
        table_names=tuple(names),
        exact=sum(torch.Size(named[name]).numel() for name in exact),
        model_type=model.config.get_text_config().model_type,
    )


def refuse_unpackable(model: Any) -> None:
    """Raises ModelError naming what in `model` would mix the sequences of a row."""
    for name, module in model.base_model.named_modules():
        kind = type(module).__name__
        if isinstance(module, MIXERS):
            raise ModelError(f"{name} ({kind}) would mix the sequences of a packed row: {attention.UNTRAINABLE}")


def _kinds(model: Any) -> list[str]:
    """The kind of each layer, by a name."""
    names: dict[Hashable, str] = {}
    found = []
    for layer, kind, reach in zip(layers_of(model), kinds_of(model), types_of(model), strict=True):
        if reach is not None and reach not in NO_MASKS:
            raise ModelError(f"layers of type {reach!r} are not known to packed rows: {attention.UNTRAINABLE}")
        found.append(names.setdefault(kind, f"{type(layer).__name__} {len(names) + 1}"))
    return found


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def _calls(model: Any, layers: list[nn.Module], kinds: list[str]) -> dict[str, tuple[Call, Call]]:
    """How the model calls the first layer of each kind, on rows of TOKENS and twice as many; each is checked."""
    from transformers import AttentionInterface

    reached: list[Any] = []

    def watched(module: nn.Module, *tensors: Any, **named: Any) -> Any:
        reached.append(named.get("sliding_window"))
        return attention.attend(module, *tensors, **named)

    AttentionInterface.register(NAME, watched)
    model.set_attn_implementation(NAME)
    firsts = {kind: layers[number] for number, kind in reversed(list(enumerate(kinds)))}
    found: dict[str, list[Call]] = {kind: [] for kind in firsts}
    windows: dict[str, list[Any]] = {}
    hooks = []
    for kind, layer in firsts.items():

        def note(layer: nn.Module, args: Any, kwargs: Any, kind: str = kind) -> None:
            found[kind].append((layer, args, kwargs))
            reached.clear()

        def end(layer: nn.Module, args: Any, output: Any, kind: str = kind) -> None:
            windows[kind] = list(reached)

        hooks += [layer.register_forward_pre_hook(note, with_kwargs=True), layer.register_forward_hook(end)]
    for tokens in (TOKENS, 2 * TOKENS):
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        inputs = {"position_ids": ids, "attention_mask": NO_MASKS, "packing": packing_of([tokens]).to(ids.device)}
        try:
            model.base_model(input_ids=ids, use_cache=False, **inputs)
        except TandemError:
            raise
        except Exception as error:  # whatever a forward does that needs data
            said = str(error).strip().partition("\n")[0]
            raise ModelError(f"{type(model).__name__}'s forward cannot be followed without data ({said})") from None
    for hook in hooks:
        hook.remove()
    _check_windows(model, kinds, windows)
    return {kind: (calls[0], calls[1]) for kind, calls in found.items()}


def _check_windows(model: Any, kinds: list[str], windows: dict[str, list[Any]]) -> None:
    """A window that only a mask had is lost in a packed row, and nothing but a long transcript would show it."""
    wanted = getattr(model.config.get_text_config(), "sliding_window", None)
    for kind, reach in zip(kinds, types_of(model), strict=True):
        handed = windows[kind]
        if not handed:
            raise ModelError(f"{kind} does not compute by transformers' attentions: {attention.UNTRAINABLE}")
        if wanted and reach in ("sliding_attention", None) and None in handed:
            raise ModelError(
                f"{kind} has a window of {wanted} tokens and does not tell its attention: {attention.UNTRAINABLE}"
            )


# -- counting ---------------------------------------------------------------------------------------------------------


def _costs(shorter: Call, longer: Call) -> LayerCosts:
    layer = shorter[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    one, two = measure(*shorter), measure(*longer)
    saved, peak, factors = ((b - a) // TOKENS for a, b in zip(one, two, strict=True))
    return LayerCosts(shapes, saved, peak - saved, factors)


def measure(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """(kept for backward, at most there in backward, left as factors), in bytes, of one call of `layer` on any device.
    Its input counts, its output does not; parameters and what it shares with other layers do not either."""
    hidden = args[0].detach().requires_grad_()
    shared = [tensor for tensor in tree_leaves((args[1:], kwargs)) if isinstance(tensor, Tensor)]
    apart = {_place(tensor) for tensor in [*layer.parameters(), *layer.buffers(), *shared]}
    kept: dict[int, int] = {_place(hidden): hidden.untyped_storage().nbytes()}

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in apart:
            kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), _Live(apart) as live, _factors(layer) as factors:
        live.add(hidden)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(hidden, *args[1:], **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        saved, live.most = sum(kept.values()), 0
        out.backward(torch.empty_like(out))
        layer.zero_grad(set_to_none=True)
    return saved, live.most - out.untyped_storage().nbytes(), sum(factors)


@contextmanager
def _factors(layer: nn.Module) -> Iterator[list[int]]:
    """Bytes of each distinct input of a linear layer, and of each output."""
    found: list[int] = []
    inputs: set[int] = set()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output.nbytes)
        if _place(args[0]) not in inputs:
            inputs.add(_place(args[0]))
            found.append(args[0].nbytes)

    hooks = [module.register_forward_hook(note) for module in layer.modules() if isinstance(module, nn.Linear)]
    yield found
    for hook in hooks:
        hook.remove()


class _Live(TorchDispatchMode):
    """Bytes of the storages that appeared inside and are still there; `most`: the most at a time."""

    def __init__(self, apart: set[int]) -> None:
        super().__init__()
        self.apart, self.now, self.most = apart, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        """It has appeared, unless it was there."""
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.apart or place in self._known:
            return
        self._known.add(place)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, storage.nbytes())

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main(folder: str) -> None:
    """One line of JSON: the sizes, or {"error"}."""
    try:
        found = trace(on_meta(Path(folder)))
    except TandemError as error:
        print(json.dumps({"error": str(error)}))
    except Exception as error:  # transformers', of many types
        print(json.dumps({"error": f"transformers does not build it: {' '.join(str(error).split())}"}))
    else:
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1])
