"""The worker: puts the rooms together, once, and drains the queue until told to stop.

Order of a start: server (one trainer at a time), weights, their recovery, Redis, then the queue. Each refusal is one
sentence that says what to do.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis
import torch
from transformers import AutoTokenizer

from worker.checkpoint.batch_codec import rename
from worker.checkpoint.manager import Keeper
from worker.checkpoint.replay import make_deterministic
from worker.checkpoint.snapshots import Trained
from worker.checkpoint.state_dir import StateDir, default_state_dir
from worker.config.guard_options import GuardSettings
from worker.config.hyperparameters import Hyperparameters
from worker.config.protocol import Unavailable
from worker.config.retention import Policy
from worker.config.update_options import MAX_TOKENS, ApplySettings
from worker.consumer.batch_worker import BatchWorker
from worker.consumer.events import Hooks
from worker.consumer.settlement import settle_with_rq
from worker.consumer.worker_lock import WorkerLock
from worker.data.batch_capacity import room_for
from worker.data.replay_buffer import Rehearsal
from worker.orchestrator.canary import canary_hooks
from worker.orchestrator.live_update import SharedUpdate
from worker.orchestrator.recovery import mend_redis, mend_weights, take_note, take_over
from worker.orchestrator.reports import sentence
from worker.orchestrator.rollback import roll_back
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import attach
from worker.trainer.device import choose_way, growing_segments, keep_within, warm
from worker.trainer.outliers import Guards
from worker.trainer.trainer import make_builder, make_trainer
from worker.utils import torch_setup
from worker.utils.duty_cycle import Duty
from worker.versions import ledger, pause_switch
from worker.versions.reconcile import reconcile
from worker.versions.rest_status import rest

log = logging.getLogger("tandem")

REDIS_SECONDS = 60.0
"""How long a step waits for a Redis that is away before it gives its jobs back."""


class RedisBehind(Unavailable):
    """Redis does not know a version that is in the weights."""


@contextlib.contextmanager
def attach_step(
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
) -> Iterator[SharedUpdate]:
    """The update protocol on the server of `run_dir`, as its only trainer, from here to the end of the block.

    Torn or restarted weights are brought back first from `state_dir` (default: by the model's path). policy: what the
    state directory keeps; None, for those who only visit it: everything. known: what Redis says of the weights, if it
    was asked. max_tokens: most of a version.
    """
    torch_setup.prepare()
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(ServerControl(run_dir, name))
        with growing_segments():
            weights = attach(run_dir)
            torch.empty(1, device=weights.state.device)
        state = stack.enter_context(StateDir(state_dir or default_state_dir(weights.model_path)))
        make_deterministic(weights.state.device)
        model = weights.build_model()
        tokenizer = AutoTokenizer.from_pretrained(weights.model_path)
        builder = make_builder(tokenizer, weights.model_path, h, **control.rendering)
        keep_within(settings, weights.state.device)
        way = choose_way(model, weights.model_path, h, settings, max_tokens, weights.state.device)
        # Whatever is trained again, is trained in the way that new versions are.
        make = partial(
            make_trainer,
            model,
            list(model.named_parameters()),
            tokenizer,
            state=weights.state,
            streaming=way.streaming,
            budget=way.budget,
        )
        room = partial(room_for, packed=weights.state.is_cuda, streaming=way.streaming, budget=way.budget)
        keeper = stack.enter_context(contextlib.closing(Keeper(state, weights, make, room, policy)))
        for report in mend_weights(keeper, control, known, new_lineage=new_lineage):
            log.info(sentence(report))
        trainer = make(h)
        warm(trainer)
        duty = Duty(settings.duty_cycle)
        yield SharedUpdate(weights, control, trainer, builder, keeper, h, hogwild=settings.hogwild, duty=duty)


def drain(
    connection: redis.Redis, step: SharedUpdate, lock: WorkerLock, *, burst: bool, hooks: Sequence[Hooks], **limits: Any
) -> None:
    """Work until told to stop. A Redis that comes back with less than the weights have is mended in between, once a
    version."""
    mended = -1
    while True:
        worker = BatchWorker(connection, step, hooks=hooks, lock=lock, **limits)
        worker.check = partial(between_batches, connection, step, worker, burst)
        try:
            worker.work(burst=burst)
            return
        except (ledger.LedgerMismatch, RedisBehind) as error:
            if (version := step.weights.header.version) == mended:
                raise
            mended = version
            log.warning("%s; it gets them from the journal", error)
            if said := lock.acquire():
                log.info(said)
            agree(connection, step)


def between_batches(connection: redis.Redis, step: SharedUpdate, worker: BatchWorker, burst: bool) -> None:
    """Raises `Unavailable` when the server has gone; waits while training is held; writes a checkpoint when due; rests
    as long as the duty cycle asks."""
    step.check()
    pause_switch.wait(connection, burst=burst, stopping=lambda: bool(worker.stop_requested), tell=log.warning)
    if report := step.keeper.checkpoints.write_if_due():
        log.info(sentence(report))

    def stopping() -> bool:
        nothing_left = burst and not worker.batcher.hands and not worker.queue.count
        return bool(worker.stop_requested) or nothing_left

    rest(connection, step.duty, stopping=stopping, check=step.check)


def confirm(connection: redis.Redis, step: SharedUpdate) -> None:
    """Before a step: Redis stands where the weights do. It may have come back from an old copy with jobs that are
    trained already. Waits for a Redis that is away; raises `RedisBehind`, or `Unavailable` after `REDIS_SECONDS`."""
    deadline = time.monotonic() + REDIS_SECONDS
    while True:
        try:
            known = ledger.state(connection)
            break
        except redis.RedisError as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"Redis has not answered for {REDIS_SECONDS:g} s ({error})") from error
            time.sleep(0.2)
    header = step.weights.header.fields()
    if (known.version, known.lineage) != (header["version"], header["lineage"]):
        raise RedisBehind(f"Redis is at version {known.version}, the weights are at {header['version']}")


def watch(connection: redis.Redis, step: SharedUpdate, settings: GuardSettings) -> Sequence[Hooks]:
    """Give the step its guards, with the memory of the journal; returns the canary's hooks."""
    step.guards = Guards(settings.outliers)
    if settings.rehearse:
        step.rehearsal = Rehearsal(settings.rehearse, rename, seed=step.h.seed)
    step.remember()

    def go_back(version: int) -> int:
        for report in roll_back(connection, step, version, reason="the canary set's loss"):
            log.info(sentence(report))
        return step.weights.header.version

    return canary_hooks(settings, step.builder, lambda examples: step.trainer.score(examples), connection, go_back)


def agree(connection: redis.Redis, step: SharedUpdate, *, new_lineage: bool = False) -> None:
    """Redis, weights and state directory tell one story afterwards; it is logged. Call it with the worker lock held."""
    header = step.weights.header
    for report in mend_redis(connection, step.keeper, header.fields()):
        log.info(sentence(report))
    for line in reconcile(
        connection,
        header.fields(),
        step.weights.record.read(),
        new_lineage=new_lineage,
        adopt=partial(take_over, step.keeper, step.control),
        settle=settle_with_rq(connection),
    ):
        log.info(line)
    everybody = partial(_everybody, connection)
    if written := take_note(step.keeper, everybody):
        log.info(sentence(written))


def _everybody(connection: redis.Redis) -> Trained:
    return Trained(ledger.everyone(connection), ledger.dropped(connection))
