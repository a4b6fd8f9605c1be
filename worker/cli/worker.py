"""`tandem worker`: drains the queue and trains the served weights. See orchestrator/worker_loop.py."""

import contextlib
import logging
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.cli.places import run_dir_option
from worker.cli.replicas import check_together, follow, meeting_of
from worker.config.guard_options import guard_options, settings_of
from worker.config.hyperparameters import Hyperparameters, training_options
from worker.config.replica_options import placed, replica_options, replica_settings_of
from worker.config.retention import policy_of, state_options
from worker.config.update_options import apply_options, apply_settings_of, max_tokens_option
from worker.consumer.log_lines import LogHooks
from worker.consumer.worker_lock import WorkerLock
from worker.operations.worker_metrics import WorkerMetrics
from worker.orchestrator.agreement import agree
from worker.orchestrator.fleet import Fleet
from worker.orchestrator.lone import Lone
from worker.orchestrator.rank_fleet import RankFleet
from worker.orchestrator.reports import log_report
from worker.orchestrator.session import open_session
from worker.orchestrator.worker_loop import WorkerLoop
from worker.trainer.threads import TrainingThreads
from worker.utils.metrics_http import is_loopback
from worker.utils.unix_socket import default_run_dir
from worker.versions import ledger
from worker.versions.eviction_watch import check_kind

log = logging.getLogger("tandem")


@click.command()
@redis_option
@run_dir_option
@click.option("--name", help="This worker's name, in errors and dashboards (default: host and pid).")
@click.option("--max-jobs", type=click.IntRange(1), default=32, help="Most transcripts in a version.")
@max_tokens_option
@click.option(
    "--linger",
    type=click.FloatRange(0),
    default=0.25,
    help="Most seconds to wait for a batch to fill; it goes after a quarter of that in which nothing came.",
)
@click.option("--until-empty", is_flag=True, help="Stop when the queue is empty.")
@click.option("--burst", is_flag=True, hidden=True, help="The former name of --until-empty.")
@click.option("--new-lineage", is_flag=True, help="Use a restarted server as it is; what it had learnt is lost.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads for training (default: before each version, as many as CPUs are free).",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Show metrics for Prometheus at http://127.0.0.1:PORT/metrics; 0 takes a free port (default: none).",
)
@click.option(
    "--metrics-host", default="127.0.0.1", help="Address for --metrics-port. Everybody who reaches it can read."
)
@replica_options
@state_options
@guard_options
@apply_options
@training_options
def command(
    redis_url: str | None,
    run_dir: Path | None,
    name: str | None,
    max_jobs: int,
    max_tokens: int,
    linger: float,
    until_empty: bool,
    burst: bool,
    new_lineage: bool,
    threads: int | None,
    metrics_port: int | None,
    metrics_host: str,
    state_dir: Path | None,
    **options: Any,
) -> None:
    """Drain the queue and train the weights that the server of --run-dir is serving."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cpu_threads = TrainingThreads(threads)
    policy, guards, settings = policy_of(options), settings_of(options), apply_settings_of(options)
    replica = replica_settings_of(options)
    check_together(replica, settings)
    name = name or f"{socket.gethostname()}-{os.getpid()}" + (f"-replica-{replica.number}" if replica else "")
    run_dir = placed(run_dir or default_run_dir(), replica)
    state_dir = placed(state_dir, replica) if state_dir is not None else None
    opening = partial(
        open_session,
        run_dir,
        name,
        Hyperparameters(**options),
        state_dir=state_dir,
        policy=policy,
        settings=settings,
        max_tokens=max_tokens,
    )
    if replica is not None and replica.follows:
        follow(replica, opening, policy)
        return
    url = resolve_url(redis_url)
    connection = connect(url, redis.Redis.from_url)
    with redis_errors(safe_url(url)):
        check_kind(connection, safe_url(url))
    metrics = WorkerMetrics(url, run_dir)
    with contextlib.ExitStack() as stack:
        if metrics_port is not None:
            log.info("metrics: %s", stack.enter_context(metrics.serving(metrics_host, metrics_port)))
            if not is_loopback(metrics_host):
                log.warning("metrics: everybody who reaches %s can read them; they hold no text", metrics_host)
        lock = WorkerLock(connection, name)
        if taken_over := lock.acquire():
            log.info(taken_over)
        stack.callback(lock.release)
        tell = metrics.telling(log_report)
        known, number = ledger.state(connection), replica.number if replica is not None else None
        session = stack.enter_context(opening(known=known, new_lineage=new_lineage, tell=tell, replica=number))
        agree(connection, session, new_lineage=new_lineage, tell=tell)
        metrics.began(session.weights.header.version, session.manager.folder)
        fleet: Lone | None = RankFleet(session.ranks) if session.ranks is not None else None
        if replica is not None:
            fleet = Fleet(session, meeting_of(replica), replica.wait)
            max_tokens *= replica.count  # a replica's part is as long as a lone worker's version
        limits: dict[str, Any] = {"name": name, "max_jobs": max_jobs, "max_tokens": max_tokens, "linger": linger}
        limits["history"] = policy.history
        hooks, empty = [LogHooks(), metrics], until_empty or burst
        loop = WorkerLoop(
            connection,
            session,
            lock,
            guards,
            cpu_threads,
            until_empty=empty,
            hooks=hooks,
            tell=tell,
            fleet=fleet,
            **limits,
        )
        loop.run()
        if policy.at_stop and (report := session.manager.checkpoints.try_write()):
            tell(report)
