"""Who trains in training.py: ours, streaming and burst, and the peers, all on the very same weights.

A contestant takes one step over examples and says how long its two halves took. Must not know: how often, in which
order.
Invariants: no contestant holds gradients or activations between its steps; weights exist once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from agreement import draw_weights
from flops import wait
from optimizer import import_apollo_torch

from worker.apollo import state_bytes
from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.memory.plan import Way
from worker.shared_weights import bind
from worker.shared_weights.slices import FLOAT32_PARAMETERS
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

LR = 1e-6
"""Small: what is measured is time, and all contestants change the same weights."""


@dataclass(frozen=True)
class Halves:
    """Seconds of a step, in two parts that follow one another."""

    first: float
    second: float


class Contestant(Protocol):
    name: str
    halves: tuple[str, str]
    """What `Halves` are."""
    state_bytes: int
    """Of the optimizer."""
    least_bytes: int
    """What a step needs at least: weights, gradients where they are kept, the optimizer's state."""

    def step(self, examples: Sequence[Example]) -> Halves:
        """One step over sequences of equal length."""

    def forget(self) -> None:
        """After an error: let go of everything but the state."""


def make_weights(model_dir: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The text model's tensors on `device`, with the values of a fresh model; dtypes as vLLM has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir).get_text_config()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {}
    for name, shape in sorted(shapes.items()):
        exact = name.rpartition(".")[2] in FLOAT32_PARAMETERS
        tensors[name] = torch.empty(shape, device=device, dtype=torch.float32 if exact else torch.bfloat16)
    draw_weights(bind.build_model(model_dir, tensors))
    return tensors


class Ours:
    """`worker.trainer.trainer`, as `tandem worker` runs it."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, *, way: Way, budget: int) -> None:
        h = Hyperparameters(lr=LR, max_length=budget)
        named = list(model.named_parameters())
        self.trainer: Trainer = make_trainer(model, named, tokenizer, h, state=None, way=way, budget=budget)
        self.name = f"ours, {way}"
        self.halves = ("forward", "backward and sweep") if way == "streaming" else ("forward and backward", "sweep")
        count = sum(parameter.numel() for _, parameter in named)
        self.state_bytes = state_bytes([parameter.shape for _, parameter in named])
        self.least_bytes = (4 if way == "burst" else 2) * count + self.state_bytes

    def step(self, examples: Sequence[Example]) -> Halves:
        device = self.trainer.device
        wait(device)
        started = time.perf_counter()
        self.trainer.begin(examples)
        wait(device)
        middle = time.perf_counter()
        self.trainer.apply()
        wait(device)
        return Halves(middle - started, time.perf_counter() - middle)

    def forget(self) -> None:
        self.trainer.forget()


class Peer:
    """transformers as it comes, with gradient checkpointing, and an optimizer of torch's kind."""

    halves = ("forward and backward", "optimizer")

    def __init__(
        self, name: str, model: Any, make_optimizer: Callable[[list[torch.nn.Parameter]], Any], state_bytes: int
    ) -> None:
        self.name, self.model, self._make, self._optimizer = name, model, make_optimizer, None
        self._parameters = list(model.parameters())
        self.state_bytes = state_bytes
        self.least_bytes = 4 * sum(parameter.numel() for parameter in self._parameters) + state_bytes

    def step(self, examples: Sequence[Example]) -> Halves:
        if self._optimizer is None:
            self._optimizer = self._make(self._parameters)
        device = self._parameters[0].device
        ids = torch.tensor([example.sequences[0].ids for example in examples]).to(device)  # [B, T]
        wait(device)
        started = time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        wait(device)
        middle = time.perf_counter()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        wait(device)
        return Halves(middle - started, time.perf_counter() - middle)

    def forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._optimizer = None


def make_peers(model_dir: Path, tensors: dict[str, torch.Tensor]) -> list[Peer]:
    """Plain transformers with fused AdamW (bf16 state), and with the official APOLLO where it can be imported. Call it
    before anything of transformers is patched."""
    model = bind.build_model(model_dir, tensors)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    count = sum(tensor.numel() for tensor in tensors.values())

    def adamw(parameters: list[torch.nn.Parameter]) -> Any:
        return torch.optim.AdamW(parameters, lr=LR, fused=True)

    peers = [Peer("transformers, AdamW fused", model, adamw, 4 * count)]
    official = import_apollo_torch()
    if official is None:
        return peers

    def apollo(parameters: list[torch.nn.Parameter]) -> Any:
        low_rank = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
        matrices = [parameter for parameter in parameters if parameter.dim() == 2]
        others = [parameter for parameter in parameters if parameter.dim() != 2]
        return official([{"params": others}, {"params": matrices, "proj_type": "std", **low_rank}], lr=LR)

    rows = sum(max(tensor.shape) for tensor in tensors.values() if tensor.dim() == 2)
    return [*peers, Peer("transformers, apollo-torch", model, apollo, 4 * rows)]
