"""`tandem worker`: drains the queue and trains the served weights. See orchestrator/worker_loop.py."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.cli.places import run_dir_option
from worker.cli.replicas import check_together, follow, lead
from worker.cli.side_by_side import run_side_by_side
from worker.config.guard_options import guard_options, settings_of
from worker.config.hyperparameters import Hyperparameters, training_options
from worker.config.replica_options import ReplicaSettings, check_places, placed, replica_options, replica_settings_of
from worker.config.retention import policy_of, state_options
from worker.config.update_options import apply_options, apply_settings_of, max_tokens_option
from worker.consumer.log_lines import LogHooks
from worker.consumer.worker_lock import WorkerLock
from worker.operations.worker_metrics import WorkerMetrics
from worker.orchestrator.agreement import agree
from worker.orchestrator.lone import Lone
from worker.orchestrator.rank_fleet import RankFleet
from worker.orchestrator.reports import log_report
from worker.orchestrator.session import Session, open_session
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
    max_tokens: int,
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
    limits = {"max_jobs": options.pop("max_jobs"), "linger": options.pop("linger")}
    policy, guards, settings = policy_of(options), settings_of(options), apply_settings_of(options)
    replica = replica_settings_of(options)
    check_together(replica, settings)
    if replica is not None and replica.here:
        check_places(run_dir or default_run_dir(), state_dir)
        sys.exit(run_side_by_side(sys.argv[1:], replica.count))
    name = name or f"{socket.gethostname()}-{os.getpid()}" + (f"-replica-{replica.number}" if replica else "")
    run_dir = placed(run_dir or default_run_dir(), replica)
    state_dir = placed(state_dir, replica) if state_dir is not None else None
    opening = partial(open_session, run_dir, name, Hyperparameters(**options), state_dir=state_dir, policy=policy)
    number = replica.number if replica is not None else None
    opening = partial(opening, settings=settings, max_tokens=max_tokens, replica=number)
    if replica is not None and replica.follows:
        follow(replica, opening, policy)
        return
    metrics = WorkerMetrics(resolve_url(redis_url), run_dir)
    with _ready(name, metrics, (metrics_host, metrics_port), opening, new_lineage) as (connection, lock, session):
        tell, fleet = metrics.telling(log_report), _fleet(replica, session)
        WorkerLoop(
            connection,
            session,
            lock,
            guards,
            TrainingThreads(threads),
            until_empty=until_empty or burst,
            hooks=[LogHooks(), metrics],
            tell=tell,
            fleet=fleet,
            name=name,
            # a replica's part is as long as a lone worker's version
            max_tokens=max_tokens * (replica.count if replica is not None else 1),
            history=policy.history,
            **limits,
        ).run()
        if policy.at_stop and (report := session.manager.checkpoints.try_write()):
            tell(report)


def _fleet(replica: ReplicaSettings | None, session: Session) -> Lone | None:
    """Who trains with us: the other replicas, or the trainers of a divided server's other ranks."""
    if replica is not None:
        return lead(replica, session)
    return RankFleet(session.ranks) if session.ranks is not None else None


def _release(lock: WorkerLock) -> None:
    """Where Redis is away the lock ends by itself, and what ends the worker is not hidden by that."""
    with contextlib.suppress(redis.RedisError):
        lock.release()


@contextlib.contextmanager
def _ready(
    name: str,
    metrics: WorkerMetrics,
    shown_at: tuple[str, int | None],
    opening: Callable[..., contextlib.AbstractContextManager[Session]],
    new_lineage: bool,
) -> Iterator[tuple[redis.Redis, WorkerLock, Session]]:
    """What `WorkerLoop` begins with: a Redis that fits, its lock held, and a session that agrees with it. shown_at:
    host and port of the metrics; no port: they are not shown."""
    host, port = shown_at
    url, tell = metrics.redis_url, metrics.telling(log_report)
    connection = connect(url, redis.Redis.from_url)
    with redis_errors(safe_url(url)):
        check_kind(connection, safe_url(url))
    with contextlib.ExitStack() as stack:
        if port is not None:
            log.info("metrics: %s", stack.enter_context(metrics.serving(host, port)))
            if not is_loopback(host):
                log.warning("metrics: everybody who reaches %s can read them; they hold no text", host)
        lock = WorkerLock(connection, name)
        with redis_errors(safe_url(url)):
            if taken_over := lock.acquire():
                log.info(taken_over)
        stack.callback(_release, lock)
        with redis_errors(safe_url(url)), lock.kept():  # a start may take minutes
            session = stack.enter_context(opening(known=ledger.state(connection), new_lineage=new_lineage, tell=tell))
            lock.renew()
            agree(connection, session, new_lineage=new_lineage, tell=tell)
        metrics.began(session.weights.header.version, session.manager.folder)
        with redis_errors(safe_url(url)):  # what redis-py says may quote a command, and so a transcript
            yield connection, lock, session
