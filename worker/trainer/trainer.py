"""One micro-batch of examples -> loss and gradients on the model's parameters -> one optimizer step.

    found = trainer.begin(examples)    # forward, and backward but in streaming; what cannot be trained is left out
    trainer.gradient_norm()            # None in streaming
    trainer.apply()                    # the step, or in its place `forget`

What is computed in `begin` and what in `apply`, by each of three ways, `pending_step` says. The parameters may be views
of the memory vLLM serves from; this module neither knows nor cares. Must not know: Redis, vLLM, the header, versions.

Invariants: `begin` changes no weight. `apply` is one optimizer step whatever the number of forward passes. Which loss a
kind of feedback has, `worker.trainer.losses` says; how weights and slopes count, `worker.trainer.weighting`.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from worker.apollo import ApolloMini
from worker.data.batch_capacity import BatchCapacity
from worker.data.examples import Example
from worker.data.packing import Batch, BatchError
from worker.memory.plan import Way
from worker.model import ModelError
from worker.model.gradient_factors import factors_of
from worker.model.layers import first_of_each_kind
from worker.trainer.captured_row import CapturedRow
from worker.trainer.captured_rows import rows_of
from worker.trainer.factor_sweep import FactorSweep
from worker.trainer.gradients import Gradients, Limit
from worker.trainer.losses import BY_KIND, Term, has_teacher, imitates
from worker.trainer.model_reader import ModelReader, Part
from worker.trainer.pending_step import PendingStep
from worker.trainer.sharing import Alone
from worker.trainer.token_sums import TokenSums
from worker.trainer.weighting import Rule, Weighting, weighted_mean
from worker.utils.fault_injection import point

NOT_FINITE = "its loss is not finite under the present weights"


class Trainer(ModelReader):
    """Trains `model`, a transformers causal language model, with `optimizer`. pad_id, sizes, budget, packed:
    `ModelReader`'s.

    A micro-batch may take several forward passes; in streaming on a GPU it must not.
    `warmup` is the number of steps over which the learning rate rises linearly to `lr`, counted by the optimizer's own
    step count so that a restarted worker goes on where it was.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: ApolloMini,
        *,
        pad_id: int,
        lr: float,
        sizes: Sequence[int],
        warmup: int = 0,
        budget: int = 4096,
        packed: bool = False,
        way: Way = "burst",
        by_factors: int = 0,
        places: int = 0,
    ) -> None:
        super().__init__(model, pad_id=pad_id, sizes=sizes, budget=budget, packed=packed)
        if self.head.vocabulary is not None and (way == "factors" or by_factors):
            raise ModelError("a model that is divided over ranks is not trained by factors: --apply burst or streaming")
        self.optimizer = optimizer
        self.lr, self.warmup = lr, warmup
        self.way, self.by_factors, self.places = way, by_factors, places
        self.sweep = FactorSweep(factors_of(model), optimizer)
        self.pending = PendingStep(optimizer, self.sweep, way)
        self.rows = rows_of(model)
        self.replayed = False
        """Whether the layers of the last micro-batch were replayed as CUDA graphs instead of launched."""
        self.sharing = Alone()
        """How the work of a micro-batch is divided, and what makes it whole."""
        self._alone = False  # the micro-batch is one row, which may be replayed
        self._written: dict[str, float] = {}

    @property
    def begun(self) -> Way:
        """The way of the micro-batch that `begin` was last called with."""
        return self.pending.way

    @property
    def room(self) -> BatchCapacity:
        """What it takes at once: `begin` raises BatchError for what this does not hold."""
        return BatchCapacity(self.sizes, self.packed, self.way, self.by_factors, self.places)

    def begin(self, examples: Sequence[Example], limit: Limit | None = None, rule: Rule = weighted_mean) -> Gradients:
        """All of a step that comes before its first write: gradients, or in streaming the forward pass.

        Examples whose loss is not finite, or beyond `limit`, are left out and reported. Raises BatchError for what
        `room` does not hold. rule: another than today's only to repeat a version that was made by it.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        most = limit.loss_limit() if limit is not None else math.inf
        rejected: dict[str, str] = {}
        self._check_room(examples)
        self.pending.way, self.replayed = self.room.way_of(examples), False
        self.device_time.begin()
        while kept := [example for example in examples if example.id not in rejected]:
            self.forget()
            parts = self._parts(kept)
            terms, bad, refused = self._terms(kept, parts, limit)
            if refused and not bad:
                rejected |= refused
                continue
            if not bad:
                weighting = rule(kept, terms)
                sums, bad = self.sharing.whole(partial(self._accumulate, kept, weighting, most, parts))
            if not bad:
                self.pending.add_up(self.sharing)
                self.pending.step_scale = weighting.step_scale
                return _gradients(kept, sums, terms, weighting, rejected)
            for id, loss in bad.items():
                beyond = limit is not None and math.isfinite(loss)
                rejected[id] = limit.loss_reason(loss) if beyond and limit is not None else NOT_FINITE
        self.forget()
        return Gradients(loss=math.nan, tokens=0, trained_tokens=0, nll={}, rejected=rejected)

    def prepare(self) -> None:
        """Do ahead what `write` would do first: call it before a server is paused."""
        self.pending.prepare()

    def apply(self) -> dict[str, float]:
        """`write`, and what `measured` says of it."""
        self.write()
        return self.measured()

    def write(self) -> None:
        """One optimizer step with what `begin` left. On a GPU it is launched; `optimizer.check` waits for it.

        Burst raises what the optimizer raises for a non-finite gradient, before any weight has changed. Whatever the
        other ways raise leaves weights half-written.
        """
        factor = min(1.0, (self.optimizer.step_count + 1) / self.warmup) if self.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.pending.apply(self.sharing)
        point("swept")
        self._written = {"lr": self.lr * factor, "step_scale": self.pending.step_scale}
        self.forget()

    def measured(self) -> dict[str, float]:
        """Of the last `write`: the RMS of update and weights, and on a GPU `peak_bytes`, the most that this process had
        allocated since `begin`, with what CUDA graphs hold. Waits for the device."""
        update = self.optimizer.last_update
        measured = self._written | {"update_rms": update.update_rms, "weight_rms": update.weight_rms}
        if self.device.type == "cuda":
            measured["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) + self.rows.held_bytes
        return measured

    def forget(self) -> None:
        """Let go of what `begin` left: nothing is applied."""
        self.pending.forget()

    def gradient_norm(self) -> float | None:
        """The L2 norm of what `begin` left, all parameters together; None in streaming, where it is not known yet.

        By factors, raises `NonFiniteGradientError`, with nothing written: `apply` could only find it half-way.
        """
        return self.pending.norm()

    def parameters(self) -> list[torch.Tensor]:
        """All that the optimizer may change."""
        return self.pending.parameters()

    def skip(self) -> None:
        """One optimizer step that changes no weight: its number is used up, as by a batch that was emptied."""
        self.forget()
        self.optimizer.begin()
        self.optimizer.finish()

    def dry_run(self, examples: Sequence[Example], few_layers: bool = False) -> None:
        """All that a step over `examples` computes before it writes, and as much memory as it takes; nothing is written
        or kept. Afterwards a step of the same shape takes nothing for the first time. few_layers: for the kernels, and
        not for the memory: of each kind of layer one is computed, at least."""
        self.forget()
        self.pending.way = self.room.way_of(examples)
        with first_of_each_kind(self.model) if few_layers else nullcontext():
            teachers, batches = self._teachers(examples), self._batches(examples)
            self._alone = len(batches) == 1
            with self.pending.recording(), self.pending.dropping():
                for batch in batches:
                    self.sweep.factors.begin_pass()
                    self._forward(batch, teachers=teachers).loss.backward()  # type: ignore[no-untyped-call]
        if self.begun == "factors":
            self.sweep.rehearse()
        self.forget()

    def warm_optimizer(self) -> None:
        """Have what the optimizer's step needs compiled."""
        self.optimizer.warm_up()

    def _parts(self, examples: Sequence[Example]) -> list[Part]:
        """What is computed here, with what its teachers expect."""
        parts = self.sharing.divide(examples)

        def taught() -> list[Part]:
            return [(part, self._teachers(part)) for part in parts]

        read = any(one.teachers and has_teacher(one.kind) for one in examples)
        return self.sharing.together(taught) if read else taught()

    def _terms(
        self, examples: Sequence[Example], parts: Sequence[Part], limit: Limit | None
    ) -> tuple[list[Term], dict[str, float], dict[str, str]]:
        """Loss and slopes of each; which cannot be trained, with its loss; and which `limit` refuses, with its reason.
        Where a slope depends on the weights, all are scored first, a forward pass without gradients; a replay repeats
        it bit for bit."""
        if all(imitates(example.kind) for example in examples):
            return [Term(math.nan) for _ in examples], {}, {}
        sums, _ = self.sharing.whole(lambda: (self._sums(examples, parts), {}))
        bad = {one.id: math.nan for one, fine in zip(examples, sums.fine().tolist(), strict=True) if not fine}
        terms, refused = [], {}
        for example, answers in zip(examples, sums.answers(), strict=True):
            terms.append(BY_KIND[example.kind](answers) if example.id not in bad else Term(math.nan))
            if limit is not None and not imitates(example.kind) and (reason := limit.refusal(example.kind, answers)):
                refused[example.id] = reason
        return terms, bad, refused

    def _accumulate(
        self, examples: Sequence[Example], weighting: Weighting, most: float, parts: Sequence[Part]
    ) -> tuple[TokenSums, dict[str, float]]:
        """Forward, and in burst backward, over every batch of `parts`: the sums. Stops before backward of one by
        which a loss is not finite or over `most`, in nats per trained token (what is not computed yet could only add to
        it): then the second of the pair says whose, with its loss. Only what is imitated can be over it."""
        bounds = torch.tensor(
            [one.trained_tokens * most if imitates(one.kind) else math.inf for one in examples], dtype=torch.float64
        )
        sums = TokenSums(examples)
        batches = [self._batches(part) for part, _ in parts]
        self._alone = sum(map(len, batches)) == 1
        with self.pending.recording():
            for some, (_, teachers) in zip(batches, parts, strict=True):
                for batch in some:
                    found = self._forward(batch, weighting.factors, teachers)
                    sums.add(batch, found, teachers)
                    fine = sums.fine() & (sums.nll[:, 0] <= bounds)
                    if not fine.all():
                        means = sums.means()
                        return sums, {examples[i].id: means[i] for i in (~fine).nonzero()[:, 0].tolist()}
                    if self.pending.keep(found.loss):
                        self.device_time.backward(batch.input_ids.numel())
                        point("backward")
                self.pending.part_done(self.sharing)
        return sums, {}

    def _check_room(self, examples: Sequence[Example]) -> None:
        """Of what is trained; `score` and `dry_run` keep no graph, and may take several passes in streaming too."""
        room = replace(self.room, parts=self.sharing.parts)
        if room.whole and not room.holds(examples):
            raise BatchError(
                f"{self.way} makes a version in one forward pass of {room.longest} tokens at most, and these"
                f" transcripts have {room.needs(examples)}, with what the chat template repeats: train on fewer"
                " turns (train_on), raise --max-tokens, or use --apply burst"
            )

    def capture(self, *sizes: int) -> bool:
        """Have `begin` replay rows of `sizes` tokens: see `CapturedRows.capture`."""
        if self.head.vocabulary is not None:
            return False  # sums over ranks in a graph were not tried
        self.forget()
        try:
            return self.rows.capture(
                self.body, self.sweep, {size: self.room.way_of_row(size) == "factors" for size in sizes}
            )
        finally:
            self.forget()

    def _head_keeper(self) -> Any:
        return self.sweep.factors.head_keeper(self.head.weight)

    def _replay(self, batch: Batch) -> CapturedRow | None:
        """What stands in for the layers over `batch`: what it leaves is there until the next row's forward pass."""
        if not self._alone or self.begun == "streaming" or not torch.is_grad_enabled():
            return None
        row = self.rows.of(batch, by_factors=self.begun == "factors")
        self.replayed |= row is not None
        return row


def _gradients(
    kept: Sequence[Example], sums: TokenSums, terms: Sequence[Term], weighting: Weighting, rejected: dict[str, str]
) -> Gradients:
    """What `begin` found of a micro-batch whose losses are fine."""
    ids, nll = [one.id for one in kept], sums.means()
    every = zip(kept, nll, terms, strict=True)
    sizes = [one.weight * term.size(one.sides) for one, term in zip(kept, terms, strict=True)]
    losses = [mean if imitates(one.kind) else term.loss for one, mean, term in every]
    return Gradients(
        loss=weighting.loss(kept, losses),
        tokens=sum(example.tokens for example in kept),
        trained_tokens=sum(example.trained_tokens for example in kept),
        nll=dict(zip(ids, nll, strict=True)),
        losses=dict(zip(ids, losses, strict=True)),
        rejected=rejected,
        step_scale=weighting.step_scale,
        shares={id: size / (sum(sizes) or 1.0) for id, size in zip(ids, sizes, strict=True)},
        effective_tokens=weighting.effective_tokens,
    )
