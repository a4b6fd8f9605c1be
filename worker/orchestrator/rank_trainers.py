"""The trainer of a server with --tensor-parallel-size: one process a rank, of which this one, rank 0's, leads.

    ranks = RankTrainers(run_dir, weights, tokenizer, memory)   # starts the others; refuses what is not divided
    chosen = ranks.choose(h, settings, max_tokens)              # plans memory, and prepares all ranks' models
    trainer = ranks.make(h)                                     # on all of them; used as any trainer

Rank 0's process is the worker's own: it has the queue, Redis, the lease, journal and checkpoints, and writes every
rank's header. The others (`rank_worker`) have their part of the model, and do what the trainer here does.

Invariants: without every rank nothing is computed; a rank that is lost ends the others, and what was not written is
computed again by new ones (`RankFleet`). Nothing is written while rank 0's header does not say APPLYING.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from producer.errors import TandemError
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings
from worker.distributed import waiting
from worker.distributed.rank_processes import Message, RankProcesses
from worker.memory.divided import beside
from worker.model.shard_group import ShardGroup
from worker.model.sharded import build_sharded
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.divided import DividedWeights
from worker.trainer.device import Chosen, Divided, choose_way, keep_within, room_of
from worker.trainer.factory import make_trainer
from worker.trainer.leading import LeadingTrainer
from worker.trainer.proof import Expected, expect
from worker.trainer.trainer import Trainer

log = logging.getLogger("tandem")
T = TypeVar("T")

SECONDS = 300.0
"""How long a rank that hangs is waited for; one that ends is noticed at once, one that is stopped in seconds."""
COMMAND = (sys.executable, "-P", "-m", "worker.orchestrator.rank_worker")


class RankTrainers:
    """Of the server in `run_dir`. memory: --memory, in GB, of each rank. Raises `GroupLostError` with what a rank said,
    where one cannot be started."""

    def __init__(self, run_dir: Path, weights: DividedWeights, tokenizer: Any, memory: float | None) -> None:
        self.weights, self.tokenizer = weights, tokenizer
        self.chosen = Chosen("burst")
        self._told = {"run_dir": str(Path(run_dir).absolute()), "memory": memory}
        self._planned: Message | None = None
        self._made: Message | None = None
        device, tell = weights.ranks[0].state.device, partial(waiting.tell, Path(run_dir))
        keep_within(ApplySettings(memory=memory), device, beside(len(weights.ranks)))
        self.processes = RankProcesses(COMMAND, len(weights.ranks), SECONDS, tell, device)
        try:
            self._start()
            self.group = ShardGroup(watch=self.processes)
            self.model = self.together({"op": "model"}, self.plain_model)
        except BaseException:
            self.processes.close()
            raise

    @property
    def count(self) -> int:
        """Of ranks, this one included."""
        return self.processes.ranks

    def together(self, message: Message, work: Callable[[], T]) -> T:
        """As `RankProcesses.together`."""
        return self.processes.together(message, work)

    def tell(self, message: Message) -> None:
        """As `RankProcesses.tell`."""
        self.processes.tell(message)

    def plain_model(self) -> Any:
        """transformers' model over rank 0's part."""
        ours = self.weights.ranks[0]
        return build_sharded(ours.model_path, ours.tensors, ours.shards, self.group)

    def choose(self, h: Hyperparameters, settings: ApplySettings, max_tokens: int) -> Chosen:
        """How all ranks train. On GPUs the memory is planned, by the fullest of them, and models are prepared, on every
        rank alike. Raises as `choose_way`."""
        if not self.weights.state.is_cuda:
            self.chosen = Chosen("streaming" if settings.apply == "streaming" else "burst")
            return self.chosen
        room = room_of(settings, [one.state.device for one in self.weights.ranks], beside(self.count))
        how = {"apply": settings.apply, "max_tokens": max_tokens, "room": room, "ranks": self.count}
        self._planned = {"op": "choose", "h": asdict(h), **how}
        self.chosen = self.together(
            self._planned, partial(choose_divided, self.model, self.weights.ranks[0], h, self._planned, settings.memory)
        )
        return self.chosen

    def make(self, h: Hyperparameters) -> Trainer:
        """A trainer on the live weights; it takes the place of the one before."""
        chosen = self.chosen
        self._made = {"op": "make", "h": asdict(h), "way": chosen.way, "budget": chosen.budget}
        ours, lead = self.weights.ranks[0], partial(LeadingTrainer, lead=self)
        return self.together(
            self._made, partial(make_divided, self.model, ours, self.tokenizer, h, chosen, self.group, lead)
        )

    def expect(self, model: Any, ids: Sequence[int]) -> Expected:
        """As `proof.expect`, on all ranks."""
        return self.together({"op": "expect", "ids": list(ids)}, partial(expect, model, ids))

    def renew(self) -> None:
        """New processes, with the present trainer's hyper-parameters. No weight may be half-written."""
        self._start()
        for message in ({"op": "model"}, self._planned, self._made):
            if message is not None:
                self.together(message, lambda: None)

    def close(self) -> None:
        """End the others."""
        self.processes.close()

    def _start(self) -> None:
        self.processes.start(self._told)
        for other in self.processes.others:
            log.info("%s of %d trains its part of the weights", other.name, self.count)


def choose_divided(
    model: Any, weights: AttachedWeights, h: Hyperparameters, message: Message, memory: float | None = None
) -> Chosen:
    """On one rank: as `choose_way`, by what `message` says to all. weights: its part."""
    settings = ApplySettings(apply=message["apply"], memory=memory)
    divided = Divided(int(message["ranks"]), int(message["room"]))
    device, most = weights.state.device, int(message["max_tokens"])
    return choose_way(model, weights.model_path, h, settings, most, device, divided=divided)


def make_divided(
    model: Any,
    weights: AttachedWeights,
    tokenizer: Any,
    h: Hyperparameters,
    chosen: Chosen,
    group: ShardGroup,
    kind: Callable[..., Trainer] = Trainer,
) -> Trainer:
    """The trainer of one rank; weights: its part; kind: as for `make_trainer`."""
    return make_trainer(
        model, list(model.named_parameters()), tokenizer, h, state=weights.state, way=chosen.way, budget=chosen.budget,
        shards=weights.shards, sum_over_shards=group.add_up, kind=kind,
    )  # fmt: skip


def check_goes_with_ranks(settings: ApplySettings, *, replica: bool) -> None:
    """Raise `TandemError` for what does not go with a server whose weights are divided over ranks."""
    if replica:
        raise TandemError(
            "--replica does not go with a server that has --tensor-parallel-size: train one such server, or replicas on"
            " one GPU each"
        )
    if settings.hogwild:
        raise TandemError("--hogwild does not go with a server that has --tensor-parallel-size: use --apply streaming")
    if settings.apply == "factors":
        raise TandemError(
            "--apply factors does not go with a server that has --tensor-parallel-size: use burst or streaming"
        )
