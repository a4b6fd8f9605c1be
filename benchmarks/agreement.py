"""Whether trainer and server compute the same from the same weights: log-probabilities, both ways.

Dummy weights have to be drawn anew first: they lie within 1e-3 of zero, the logits hardly differ from token to token,
and even a wrong mapping would agree. Must not know: queues, workers.
"""

import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.examples import Example
from worker.hyperparameters import Hyperparameters
from worker.serving.client import ServerControl
from worker.trainer import Trainer, make_trainer
from worker.weights import bind
from worker.weights.attach import AttachedWeights

PAIR = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
"""Two slices of one parameter, of equal shape: what a wrong mapping would exchange. In the first layer, whose output
all others read."""


def draw_weights(model: Any, seed: int = 0) -> None:
    """Give `model`'s parameters, in place, the values of a fresh transformers model: N(0, .02) in matrices, embedding
    and convolution, norms, A_log and dt_bias each in their own way. On the parameters' own device."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            model._init_weights(module)


def redraw(weights: AttachedWeights, run_dir: Path, model: Any) -> None:
    """`draw_weights` in the weights of a live server.

    Under a pause, which also drops what was cached of the old values; the server then goes on under the same version
    and a header that stayed CLEAN. This is no update: it has no record, and should it break off, random weights are as
    good as the random ones before. A trainer is never to do this.
    """
    with ServerControl(run_dir, "redraw") as control:
        control.pause()
        draw_weights(model)
        if weights.state.is_cuda:
            torch.cuda.synchronize(weights.state.device)
        control.resume(weights.header.version)


def reader(weights: AttachedWeights, tokenizer: Any, longest: int, *, exchanged: bool = False) -> Trainer:
    """A trainer on the shared views that only reads them; it has an optimizer's state of its own. exchanged: as if the
    mapping had taken the two tensors of PAIR for each other."""
    tensors = dict(weights.tensors)
    if exchanged:
        tensors[PAIR[0]], tensors[PAIR[1]] = tensors[PAIR[1]], tensors[PAIR[0]]
    model = bind.build_model(weights.model_path, tensors)
    if weights.state.is_cuda:
        from worker.model import fuse

        fuse(model)
    return make_trainer(model, model.named_parameters(), tokenizer, Hyperparameters(max_length=longest), state=None)


@torch.no_grad()
def trained_logprobs(trainer: Trainer, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Of each example's trained tokens [N], fp32: one forward pass an example, through the trainer's own kernels."""
    found = []
    for example in examples:
        (batch,) = trainer._batches([example])
        found.append(-trainer._forward(batch, total=1)[1].float().cpu())
    return found


def served_logprobs(url: str, model: str, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The same tokens' [N], as the server gives them over HTTP for the example as a prompt."""
    found = []
    for example in examples:
        (sequence,) = example.sequences
        body = {"model": model, "prompt": list(sequence.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            scored = json.load(reply)["choices"][0]["prompt_logprobs"]
        pairs = zip(sequence.ids, sequence.mask, scored, strict=True)
        found.append(torch.tensor([entry[str(token)]["logprob"] for token, trained, entry in pairs if trained]))
    return found


@dataclass(frozen=True)
class Agreement:
    """Differences in nats over `tokens` tokens. `spread`: standard deviation of the server's log-probabilities."""

    mean: float
    most: float
    tokens: int
    spread: float


def compare(ours: Sequence[torch.Tensor], served: Sequence[torch.Tensor]) -> Agreement:
    """Two sides' log-probabilities of the same tokens."""
    one, other = torch.cat(list(ours)).double(), torch.cat(list(served)).double()
    apart = (one - other).abs()
    return Agreement(float(apart.mean()), float(apart.max()), apart.numel(), float(other.std()))
