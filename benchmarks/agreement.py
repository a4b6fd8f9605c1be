"""Whether trainer and server compute the same from the same weights: log-probabilities, both ways.

How far two bf16 programs may lie apart depends on the model's depth and values, so that no fixed number can say it. It
is measured: the same log-probabilities are computed in fp32 from the same weights (the truth, but for fp32's own
rounding), and by transformers' plain code in bf16 (a third program, which shares no kernel with the two). Trainer and
server are right if neither is further from the truth than that third one, by more than `NOISE`.

Dummy weights have to be drawn anew first: they lie within 1e-3 of zero, the logits hardly differ from token to token,
and even a wrong mapping would agree. Must not know: queues, workers.
"""

import inspect
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.config.hyperparameters import Hyperparameters
from worker.data.examples import Example
from worker.model.loss import linear_cross_entropy
from worker.serving.control_client import ServerControl
from worker.shared_weights import bind
from worker.shared_weights.attach import AttachedWeights
from worker.trainer.factory import make_trainer
from worker.trainer.trainer import Trainer

PAIR = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
"""Two slices of one parameter, of equal shape: what a wrong mapping would exchange. In the first layer, whose output
all others read."""

NOISE = 1.5
"""How many times as far from fp32 as transformers' plain bf16 code anybody may be."""


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


def trained_logprobs(trainer: Trainer, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Of each example's trained tokens [N], fp32: one forward pass an example, through the trainer's own kernels."""
    return [-trainer.token_nll(example) for example in examples]


@torch.no_grad()
def plain_logprobs(weights: AttachedWeights, examples: Sequence[Example], *, exact: bool) -> list[torch.Tensor]:
    """The same tokens' [N], fp32, by transformers' own torch code and eager attention, one sequence at a time.

    exact: in fp32 throughout, from the very bf16 weights. A layer's weights are widened while it runs, so that this
    takes 4 bytes for each parameter of one layer and of the head, not of the model.
    """
    model: Any = weights.build_model(attn_implementation="eager").eval()
    head = model.lm_head.weight.float() if exact else model.lm_head.weight
    if exact:
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.float())
        for layer in model.model.layers:
            _widen(layer)
    found = []
    with _plain_kernels():
        for example in examples:
            (sequence,) = example.sequences
            ids = torch.tensor([sequence.ids], device=head.device)  # [1, T]
            at = torch.tensor(sequence.mask, device=head.device).nonzero()[:, 0]  # [N]
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, at - 1]  # [N, H]
            nll = linear_cross_entropy(hidden, head, ids[0, at], torch.ones(len(at), device=head.device))[1]
            found.append(-nll.cpu())
    return found


def _widen(layer: torch.nn.Module) -> None:
    """Have `layer` run on fp32 copies of its parameters, which are dropped after it."""
    kept: list[torch.Tensor] = []

    def before(*_: Any) -> None:
        kept[:] = [parameter.data for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()

    def after(*_: Any) -> None:
        for parameter, data in zip(layer.parameters(), kept, strict=True):
            parameter.data = data

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """transformers' own delta net and convolution also where fla is installed, whose kernels it would take instead."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    names = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    kept = {name: getattr(modeling, name) for name in names}
    for name, function in kept.items():
        setattr(modeling, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(modeling, name, function)


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


@dataclass(frozen=True)
class Distances:
    """Everybody's distance from fp32, that of trainer and server from each other, and that of a wrong mapping."""

    trainer: Agreement
    server: Agreement
    plain: Agreement
    """transformers' plain bf16 code: what bf16 costs here."""
    apart: Agreement
    """Trainer and server."""
    exchanged: Agreement
    """A trainer that takes the tensors of PAIR for each other, and the server."""

    def checks(self) -> dict[str, bool]:
        """What has to be so: sentence -> whether it is."""
        most = NOISE * self.plain.mean
        return {
            f"the trainer is within {NOISE} times plain bf16 code's distance from fp32": self.trainer.mean <= most,
            f"the server is within {NOISE} times plain bf16 code's distance from fp32": self.server.mean <= most,
            "two exchanged slices differ five times as much as right ones": self.exchanged.mean > 5 * self.apart.mean,
            "and as plain bf16 code does from fp32: it is no yardstick if it is wrong": self.exchanged.mean
            > 5 * self.plain.mean,
        }


def distances(
    weights: AttachedWeights, tokenizer: Any, examples: Sequence[Example], served: Sequence[torch.Tensor]
) -> Distances:
    """served: the server's log-probabilities of `examples`, of one sequence each, from the present weights."""
    longest = max(example.tokens for example in examples)
    exact = plain_logprobs(weights, examples, exact=True)
    ours = trained_logprobs(reader(weights, tokenizer, longest), examples)
    wrong = trained_logprobs(reader(weights, tokenizer, longest, exchanged=True), examples)
    return Distances(
        trainer=compare(ours, exact),
        server=compare(served, exact),
        plain=compare(plain_logprobs(weights, examples, exact=False), exact),
        apart=compare(ours, served),
        exchanged=compare(wrong, served),
    )
