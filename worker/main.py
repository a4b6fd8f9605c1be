"""`tandem worker`: puts the rooms together, once, and drains the queue until told to stop.

Order of a start: server (one trainer at a time), weights, reconcile with Redis, then the queue. Each refusal is one
sentence that says what to do.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import redis
import torch
from transformers import AutoTokenizer

from producer.jobs import connect, redis_errors, resolve_url, safe_url
from worker import torch_setup
from worker.drain import BatchWorker
from worker.hyperparameters import Hyperparameters, training_options
from worker.lock import WorkerLock
from worker.reconcile import reconcile
from worker.serving.client import ServerControl
from worker.trainer import make_builder, make_trainer
from worker.update import SharedUpdate
from worker.weights.attach import attach
from worker.wire import default_run_dir

log = logging.getLogger("tandem")


@contextlib.contextmanager
def attach_step(run_dir: Path, name: str, h: Hyperparameters) -> Iterator[SharedUpdate]:
    """The update protocol on the server of `run_dir`, as its only trainer, from here to the end of the block."""
    torch_setup.prepare()
    with ServerControl(run_dir, name) as control:
        weights = attach(run_dir)
        model = weights.build_model()
        tokenizer = AutoTokenizer.from_pretrained(weights.model_path)
        builder = make_builder(tokenizer, weights.model_path, h, **control.rendering)
        trainer = make_trainer(model, model.named_parameters(), tokenizer, h, state=weights.state)
        yield SharedUpdate(weights, control, trainer, builder)


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
    try:
        with attach_step(run_dir or default_run_dir(), name, Hyperparameters(**options)) as step:
            weights = step.weights
            for sentence in reconcile(
                connection,
                weights.header.fields(),
                weights.record.read(),
                new_lineage=new_lineage,
                adopt=lambda lineage, version: adopt(step, lineage, version),
            ):
                log.info(sentence)
            worker = BatchWorker(
                connection,
                step,
                name=name,
                max_jobs=max_jobs,
                max_tokens=max_tokens,
                linger=linger,
                lock=lock,
                check=step.check,
            )
            worker.work(burst=burst)
    finally:
        lock.release()


def adopt(step: SharedUpdate, lineage: str, version: int) -> None:
    """Make the header, and the version that the server tells its clients, say `version`."""
    step.control.pause()
    step.weights.header.adopt(lineage, version)
    step.control.resume(version)


if __name__ == "__main__":
    command()
