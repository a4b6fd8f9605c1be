"""A session: one trainer on the weights that one server is serving, from its first connection to its last.

    with open_session(run_dir, name, h, state_dir=...) as session:
        update = LiveUpdate(session, ...)            # trains versions
        roll_back(connection, session, 118)          # makes one again

`tandem worker`, `tandem rollback` and `tandem train --attach` begin with one.
Invariants: whoever has a session is the server's only trainer; its weights are whole (torn or restarted ones were
brought back before), and its trainer's loss is the model's own and the server's; nothing is missing in it and nothing
is put into it later.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from producer.errors import TandemError
from worker.checkpoint.manager import CheckpointManager
from worker.checkpoint.replay import Make, make_deterministic
from worker.checkpoint.state_dir import StateDir, default_state_dir
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import UnavailableError
from worker.config.retention import Policy
from worker.config.update_options import MAX_TOKENS, ApplySettings
from worker.data.batch_capacity import capacity_for
from worker.data.examples import ExampleBuilder
from worker.memory.divided import NCCL_BYTES
from worker.orchestrator.attach_proof import prove
from worker.orchestrator.rank_trainers import RankTrainers, check_goes_with_ranks
from worker.orchestrator.recovery import mend_weights
from worker.orchestrator.reports import Tell, log_report
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import AttachedWeights
from worker.shared_weights.divided import DividedWeights, attach_any
from worker.shared_weights.header import CLEAN
from worker.trainer.device import Chosen, choose_way, growing_segments, keep_within, warm, within_share
from worker.trainer.factory import make_builder, make_trainer
from worker.trainer.trainer import Trainer
from worker.utils import torch_setup
from worker.versions import ledger


@dataclass
class Session:
    """h, settings: how new versions are trained. trainer: on the live weights; `renew_trainer` replaces it."""

    control: ServerControl
    weights: AttachedWeights
    manager: CheckpointManager
    builder: ExampleBuilder
    trainer: Trainer
    h: Hyperparameters
    settings: ApplySettings
    ranks: RankTrainers | None = None
    """The other ranks' trainers, where the server divides its weights."""

    def check(self) -> dict[str, Any]:
        """The server's state, as `ServerControl.state`. Raises `UnavailableError` when the server has gone."""
        try:
            return self.control.state()
        except TandemError as error:
            raise UnavailableError(
                f"{error}. Start the server again, then the worker: the worker restores what the model had learnt"
            ) from error

    def renew_trainer(self) -> None:
        """The weights were made again: the optimizer's step count beside them is another now."""
        self.trainer = self.manager.rebuilder.make_trainer(self.h)


@contextlib.contextmanager
def open_session(
    run_dir: Path,
    name: str,
    h: Hyperparameters,
    *,
    state_dir: Path | None = None,
    policy: Policy | None = None,
    known: ledger.LedgerState | None = None,
    new_lineage: bool = False,
    settings: ApplySettings = ApplySettings(),  # noqa: B008  (frozen)
    max_tokens: int = MAX_TOKENS,
    tell: Tell = log_report,
    replica: int | None = None,
) -> Iterator[Session]:
    """A session with the server of `run_dir`, until the end of the block.

    Torn or restarted weights are brought back first from `state_dir` (default: by the model's path). policy: what the
    state directory keeps; None, for those who only visit it: everything. known: what Redis says of the weights, if it
    was asked. max_tokens: most of a version. replica: its number, where there are several; the weights of all but 0
    come from replica 0, and are left as they are. tell: hears what was brought back. The server says which optimizer:
    `TandemError` where `h` asks for another.
    """
    torch_setup.prepare()
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(ServerControl(run_dir, name))
        with growing_segments():
            weights = attach_any(run_dir)
            torch.empty(1, device=weights.state.device)
        h = h.settled(weights.optimizer)
        device = weights.state.device
        if isinstance(weights, DividedWeights):
            check_goes_with_ranks(settings, replica=replica is not None)
        state = stack.enter_context(StateDir(state_dir or default_state_dir(weights.model_path, replica or 0)))
        make_deterministic(device)
        tokenizer = AutoTokenizer.from_pretrained(weights.model_path)
        builder = make_builder(tokenizer, weights.model_path, h, **control.rendering)
        group_bytes = 0 if replica is None else NCCL_BYTES  # not made yet
        share = control.trainer_bytes  # knows nothing of replicas: NCCL's is of what the server left to neither
        settings = within_share(settings, share + group_bytes if share else 0)
        keep_within(settings, device, group_bytes)
        how = run_dir, weights, tokenizer, h, settings, max_tokens, group_bytes
        make, chosen, ranks = _how_to_train(stack, *how)
        room = partial(
            capacity_for,
            packed=weights.state.is_cuda,
            way=chosen.way,
            by_factors=chosen.by_factors,
            places=chosen.places,
            budget=chosen.budget,
        )
        manager = stack.enter_context(contextlib.closing(CheckpointManager(state, weights, make, room, policy)))
        if not replica:
            for report in mend_weights(manager, control, known, new_lineage=new_lineage):
                tell(report)
        trainer = make(h)
        warm(trainer, chosen)
        if weights.header.state == CLEAN:  # a torn server, which is brought up later, computes nothing
            prove(trainer, weights, control, tokenizer, ranks)
        yield Session(control, weights, manager, builder, trainer, h, settings, ranks)


def _how_to_train(
    stack: contextlib.ExitStack,
    run_dir: Path,
    weights: AttachedWeights,
    tokenizer: Any,
    h: Hyperparameters,
    settings: ApplySettings,
    max_tokens: int,
    group_bytes: int,
) -> tuple[Make, Chosen, RankTrainers | None]:
    """What makes a trainer on these weights, in which way it trains, and the other ranks' trainers where the server
    divides its weights; they end with `stack`. Whatever is trained again, is trained in the way that new versions are.
    group_bytes: as for `choose_way`.
    """
    if isinstance(weights, DividedWeights):
        ranks = stack.enter_context(contextlib.closing(RankTrainers(run_dir, weights, tokenizer, settings.memory)))
        return ranks.make, ranks.choose(h, settings, max_tokens), ranks
    model = weights.build_model()
    device = weights.state.device
    chosen = choose_way(model, weights.model_path, h, settings, max_tokens, device, group_bytes=group_bytes)
    make = partial(
        make_trainer,
        model,
        list(model.named_parameters()),
        tokenizer,
        state=weights.state,
        way=chosen.way,
        by_factors=chosen.by_factors,
        places=chosen.places,
        budget=chosen.budget,
    )
    return make, chosen, None
