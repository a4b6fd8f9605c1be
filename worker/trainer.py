"""One micro-batch of examples -> loss and gradients on the model's parameters -> one optimizer step.

The parameters may be views of the memory vLLM serves from; this module neither knows nor cares. It must not know Redis,
vLLM, the header or versions.

Invariants: `backward` changes no weight. `apply` is one optimizer step whatever the number of forward passes. The loss
is sum_i w_i * NLL_i / (all trained tokens, unweighted), so a lone transcript of weight .5 counts half.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from worker.apollo import ApolloMini
from worker.batches import Batch, make_batches
from worker.examples import Example, ExampleBuilder
from worker.faults import point
from worker.hyperparameters import Hyperparameters

NOT_FINITE = "its loss is not finite under the present weights"
NARROWEST = 128
"""The shortest row of a forward pass, in tokens. Rows have few lengths, so that nothing is tuned during traffic."""


class Limit(Protocol):
    """What says which losses are outliers: `worker.guards.Guards`."""

    def loss_limit(self) -> float:
        """The highest mean loss, in nats per trained token, that is trained."""

    def loss_reason(self, loss: float) -> str:
        """Why a transcript above it was set aside."""


@dataclass(frozen=True)
class Gradients:
    """What a backward pass found; the gradients themselves are in the parameters."""

    loss: float
    tokens: int
    trained_tokens: int
    nll: dict[str, float]
    """Example id -> mean negative log-likelihood of its trained tokens, in nats, under the weights before the step."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Example id -> why it was left out; such an example has contributed nothing."""


class Trainer:
    """Trains `model`, a transformers causal language model, with `optimizer`.

    `budget` bounds the tokens (padding included) of one forward pass; a micro-batch may take several. `warmup` is the
    number of steps over which the learning rate rises linearly to `lr`, counted by the optimizer's own step count so
    that a restarted worker goes on where it was.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: ApolloMini,
        *,
        pad_id: int,
        lr: float,
        widths: Sequence[int],
        warmup: int = 0,
        budget: int = 4096,
    ) -> None:
        self.model: Any = model
        self.body: Any = model.model
        self.head: Any = model.lm_head
        self.optimizer = optimizer
        self.pad_id = pad_id
        self.lr = lr
        self.warmup = warmup
        self.budget = max(budget, max(widths))
        self.widths = tuple(widths)
        self.device = next(model.parameters()).device

    def begin(self, examples: Sequence[Example], limit: Limit | None = None) -> Gradients:
        """Compute the gradients of `examples`; those whose loss is not finite, or beyond `limit`, are left out and
        reported."""
        most = limit.loss_limit() if limit is not None else math.inf
        rejected: dict[str, str] = {}
        while kept := [example for example in examples if example.id not in rejected]:
            self.optimizer.zero_grad(set_to_none=True)
            nll = self._accumulate(kept, most)
            bad = {id for id, value in nll.items() if not value <= most or math.isinf(value)}
            if not bad:
                counts = {example.id: example.trained_tokens for example in kept}
                total = sum(counts.values())
                weights = {example.id: example.weight for example in kept}
                return Gradients(
                    loss=sum(weights[id] * nll[id] * counts[id] for id in nll) / total,
                    tokens=sum(example.tokens for example in kept),
                    trained_tokens=total,
                    nll=nll,
                    rejected=rejected,
                )
            for id in bad:
                beyond = limit is not None and math.isfinite(nll[id])
                rejected[id] = limit.loss_reason(nll[id]) if beyond and limit is not None else NOT_FINITE
        self.optimizer.zero_grad(set_to_none=True)
        return Gradients(loss=math.nan, tokens=0, trained_tokens=0, nll={}, rejected=rejected)

    def apply(self) -> dict[str, float]:
        """One optimizer step with the gradients that `backward` left; returns the RMS of update and weights.

        Raises what the optimizer raises for a non-finite gradient, before any weight has changed.
        """
        factor = min(1.0, (self.optimizer.step_count + 1) / self.warmup) if self.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        point("swept")
        self.optimizer.zero_grad(set_to_none=True)
        update = self.optimizer.last_update
        return {"lr": self.lr * factor, "update_rms": update.update_rms, "weight_rms": update.weight_rms}

    def parameters(self) -> list[torch.Tensor]:
        """All that the optimizer may change."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def skip(self) -> None:
        """One optimizer step that changes no weight: its number is used up, as by a batch that was emptied."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.begin()
        self.optimizer.finish()

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> dict[str, float]:
        """Mean NLL per trained token by example id, without gradients."""
        sums = torch.zeros(len(examples), dtype=torch.float64)
        for batch in self._batches(examples):
            self._add_by_example(sums, batch, self._row_nll(batch))
        return {example.id: float(sums[i]) / example.trained_tokens for i, example in enumerate(examples)}

    def _accumulate(self, examples: Sequence[Example], most: float = math.inf) -> dict[str, float]:
        """Forward and backward over every batch; stops before backward of one by which a loss is not finite or over
        `most`, in nats per trained token (what is not computed yet could only add to it)."""
        counts = [example.trained_tokens for example in examples]
        total, bounds = sum(counts), torch.tensor(counts, dtype=torch.float64) * most
        sums = torch.zeros(len(examples), dtype=torch.float64)
        for batch in self._batches(examples):
            row_nll = self._row_nll(batch)  # [B]
            self._add_by_example(sums, batch, row_nll.detach())
            if not (torch.isfinite(sums) & (sums <= bounds)).all():
                break
            ((row_nll * batch.weights.to(row_nll.device)).sum() / total).backward()
            point("backward")
        return {example.id: float(sums[i]) / example.trained_tokens for i, example in enumerate(examples)}

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        return make_batches(list(examples), pad_id=self.pad_id, widths=self.widths, budget=self.budget)

    def _row_nll(self, batch: Batch) -> torch.Tensor:
        """Summed negative log-likelihood of each row's trained tokens: fp32 [B]."""
        ids, mask = batch.input_ids.to(self.device), batch.mask.to(self.device)  # [B, T]
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, H]
        rows, columns = mask.nonzero(as_tuple=True)  # the N trained positions, each predicted from the one before it
        logits = self.head(hidden[rows, columns - 1]).float()  # [N, V]
        nll = F.cross_entropy(logits, ids[rows, columns], reduction="none")  # [N]
        return torch.zeros(ids.shape[0], device=self.device).index_add(0, rows, nll)

    @staticmethod
    def _add_by_example(sums: torch.Tensor, batch: Batch, row_nll: torch.Tensor) -> None:
        real = batch.examples >= 0
        sums.index_add_(0, batch.examples[real], row_nll.cpu().double()[real])


def widths_up_to(longest: int) -> tuple[int, ...]:
    """The row lengths, in tokens, that cover sequences of up to `longest`: powers of two from `NARROWEST`."""
    widths = [NARROWEST]
    while widths[-1] < longest:
        widths.append(2 * widths[-1])
    return tuple(widths)


def make_builder(
    tokenizer: Any,
    model_dir: Path,
    h: Hyperparameters,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> ExampleBuilder:
    """The examples of the model in `model_dir`, rendered as its server does: see `ServerControl.rendering`."""
    ends: Any = ()
    if (model_dir / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model_dir).eos_token_id or ()
    return ExampleBuilder(
        tokenizer,
        max_tokens=h.max_length,
        overlong=h.overlong,
        chat_template=chat_template,
        template_kwargs=template_kwargs,
        end_ids=[ends] if isinstance(ends, int) else ends,
    )


def make_trainer(
    model: torch.nn.Module,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tokenizer: Any,
    h: Hyperparameters,
    *,
    state: torch.Tensor | None,
) -> Trainer:
    """The trainer over all text parameters, frozen ones included; `state` holds the optimizer's, None: its own memory.

    The order, and with it the layout of `state` and every random draw, depends on the names alone, so it is the same
    whatever `h.embeddings` says: frozen parameters simply never have a gradient.
    """
    named = sorted(parameters, key=lambda item: item[0])
    for name, parameter in named:
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        parameter.requires_grad_(not (is_table and h.embeddings == "frozen"))
    optimizer = ApolloMini(
        named,
        lr=h.lr,
        scale=h.scale_value(),
        weight_decay=h.weight_decay,
        rounding=h.rounding,
        seed=h.seed,
        state=state,
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked out either way
    widths = widths_up_to(h.max_length)
    return Trainer(model, optimizer, pad_id=pad_id, lr=h.lr, warmup=h.warmup, widths=widths)
