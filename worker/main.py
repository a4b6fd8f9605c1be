"""`tandem worker`: puts the rooms together, once, and drains the queue until told to stop.

Order of a start: server (one trainer at a time), weights, their recovery, Redis, then the queue. Each refusal is one
sentence that says what to do.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import redis
import torch
from transformers import AutoTokenizer

from producer.jobs import connect, redis_errors, resolve_url, safe_url
from worker import ledger, torch_setup
from worker.drain import BatchWorker
from worker.hyperparameters import Hyperparameters, training_options
from worker.keeper import Keeper, Policy
from worker.lock import WorkerLock
from worker.reconcile import reconcile
from worker.recovery import mend_redis, mend_weights, take_note, take_over
from worker.replay import make_deterministic
from worker.serving.client import ServerControl
from worker.state_dir import StateDir, default_state_dir
from worker.trainer import make_builder, make_trainer
from worker.update import SharedUpdate
from worker.weights.attach import attach
from worker.wire import default_run_dir

log = logging.getLogger("tandem")

F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def attach_step(
    run_dir: Path,
    name: str,
    h: Hyperparameters,
    *,
    state_dir: Path | None = None,
    policy: Policy = Policy(),  # noqa: B008  (frozen)
    known: ledger.LedgerState | None = None,
    new_lineage: bool = False,
) -> Iterator[SharedUpdate]:
    """The update protocol on the server of `run_dir`, as its only trainer, from here to the end of the block.

    Torn or restarted weights are brought back first from `state_dir` (default: by the model's path). known: what Redis
    says of the weights, if it was asked.
    """
    torch_setup.prepare()
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(ServerControl(run_dir, name))
        weights = attach(run_dir)
        state = stack.enter_context(StateDir(state_dir or default_state_dir(weights.model_path)))
        make_deterministic(weights.state.device)
        model = weights.build_model()
        tokenizer = AutoTokenizer.from_pretrained(weights.model_path)
        builder = make_builder(tokenizer, weights.model_path, h, **control.rendering)
        make = partial(make_trainer, model, list(model.named_parameters()), tokenizer, state=weights.state)
        keeper = stack.enter_context(contextlib.closing(Keeper(state, weights, make, policy)))
        for sentence in mend_weights(keeper, control, known, new_lineage=new_lineage):
            log.info(sentence)
        yield SharedUpdate(weights, control, make(h), builder, keeper, h)


def state_options(command: F) -> F:
    """Click decorator: the flags of `Policy`, and where the state lies; `policy_of` reads them."""
    defaults = Policy()
    options = [
        click.option("--state-dir", type=click.Path(path_type=Path), help="For journal and checkpoints."),
        click.option("--checkpoint-every", type=click.IntRange(1), default=defaults.every, help="In versions."),
        click.option("--checkpoint-minutes", type=click.FloatRange(0), default=defaults.minutes, help="Or in time."),
        click.option("--keep-checkpoints", type=click.IntRange(2), default=defaults.keep, help="How many; 2 or more."),
        click.option("--history", type=click.IntRange(0), default=defaults.history, help="Versions to roll back to."),
        click.option(
            "--keep-transcripts",
            type=click.FloatRange(0),
            metavar="HOURS",
            help="Texts older than this leave the journal once a checkpoint covers them (default: with their file).",
        ),
        click.option(
            "--checkpoint-at-stop/--no-checkpoint-at-stop", default=defaults.at_stop, help="One more on the way out."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def policy_of(options: dict[str, Any]) -> Policy:
    """Takes its flags out of a command's options."""
    names = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "history", "keep_transcripts")
    return Policy(*(options.pop(name) for name in (*names, "checkpoint_at_stop")))


@click.command()
@click.option("--redis", "redis_url", metavar="URL", help="Default: $REDIS_URL, else redis://127.0.0.1:6379/0.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="The server's run directory.")
@click.option("--name", help="This worker's name, in errors and dashboards (default: host and pid).")
@click.option("--max-jobs", type=click.IntRange(1), default=32, help="Most transcripts in a version.")
@click.option("--max-tokens", type=click.IntRange(1), default=8192, help="Most tokens in a version.")
@click.option("--linger", type=click.FloatRange(0), default=0.25, help="Seconds to wait for a batch to fill.")
@click.option("--burst", is_flag=True, help="Stop when the queue is empty.")
@click.option("--new-lineage", is_flag=True, help="Go on with a restarted server: what it had learnt is lost.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads for training (default: torch's choice).")
@state_options
@training_options
def command(
    redis_url: str | None,
    run_dir: Path | None,
    name: str | None,
    max_jobs: int,
    max_tokens: int,
    linger: float,
    burst: bool,
    new_lineage: bool,
    threads: int | None,
    state_dir: Path | None,
    **options: Any,
) -> None:
    """Drain the queue and train the weights that the server of --run-dir is serving."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if threads:
        torch.set_num_threads(threads)
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    connection = connect(resolve_url(redis_url), redis.Redis.from_url)
    with redis_errors(safe_url(resolve_url(redis_url))):
        connection.ping()
    lock = WorkerLock(connection, name)
    if taken_over := lock.acquire():
        log.info(taken_over)
    policy = policy_of(options)
    try:
        with attach_step(
            run_dir or default_run_dir(),
            name,
            Hyperparameters(**options),
            state_dir=state_dir,
            policy=policy,
            known=ledger.state(connection),
            new_lineage=new_lineage,
        ) as step:
            agree(connection, step, new_lineage=new_lineage)
            worker = BatchWorker(
                connection,
                step,
                name=name,
                max_jobs=max_jobs,
                max_tokens=max_tokens,
                linger=linger,
                lock=lock,
                check=partial(between_batches, step),
            )
            worker.work(burst=burst)
            if policy.at_stop and (said := step.keeper.checkpoint()):
                log.info(said)
    finally:
        lock.release()


def agree(connection: redis.Redis, step: SharedUpdate, *, new_lineage: bool = False) -> None:
    """Redis, weights and state directory tell one story afterwards; it is logged. Call it with the worker lock held."""
    header = step.weights.header
    said = mend_redis(connection, step.keeper, header.fields())
    said += reconcile(
        connection,
        header.fields(),
        step.weights.record.read(),
        new_lineage=new_lineage,
        adopt=partial(take_over, step.keeper, step.control),
    )
    note = take_note(step.keeper, lambda: ledger.everyone(connection))
    for sentence in [*said, *([note] if note else [])]:
        log.info(sentence)


def between_batches(step: SharedUpdate) -> None:
    """Raises `Unavailable` when the server has gone; writes a checkpoint when one is due."""
    step.check()
    if said := step.keeper.checkpoint_if_due():
        log.info(said)


if __name__ == "__main__":
    command()
