"""`tandem rollback VERSION [--drop JOB...]`: the live server goes back to an older version."""

import os
import socket
from pathlib import Path

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import Apply, ApplySettings, apply_option, max_tokens_option, memory_option
from worker.consumer.worker_lock import WorkerLock
from worker.orchestrator.agreement import agree
from worker.orchestrator.reports import sentence
from worker.orchestrator.rollback import roll_back
from worker.orchestrator.session import open_session
from worker.utils.unix_socket import default_run_dir
from worker.versions import ledger


@click.command()
@click.argument("version", type=click.IntRange(0))
@click.option("--drop", multiple=True, metavar="JOB", help="Leave this transcript out permanently. May be repeated.")
@click.option("--requeue", is_flag=True, help="Queue the transcripts of later versions again, except --drop.")
@click.option("--reason", default="", help="For the manifest.")
@apply_option
@max_tokens_option
@memory_option
@redis_option
@click.option("--run-dir", type=click.Path(path_type=Path), help="The server's run directory.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="The worker's state directory.")
def command(
    version: int,
    drop: tuple[str, ...],
    requeue: bool,
    reason: str,
    apply: Apply,
    max_tokens: int,
    memory: float | None,
    redis_url: str | None,
    run_dir: Path | None,
    state_dir: Path | None,
) -> None:
    """Bring the live server back to VERSION, as a new version. Stop the worker first, and start it again afterwards."""
    name = f"rollback-{socket.gethostname()}-{os.getpid()}"
    connection = connect(resolve_url(redis_url), redis.Redis.from_url)
    with (
        redis_errors(safe_url(resolve_url(redis_url))),
        WorkerLock(connection, name),
        open_session(
            run_dir or default_run_dir(),
            name,
            Hyperparameters(),
            state_dir=state_dir,
            known=ledger.state(connection),
            settings=ApplySettings(apply, memory=memory),
            max_tokens=max_tokens,
        ) as session,
    ):
        agree(connection, session)
        for report in roll_back(connection, session, version, drop, reason=reason, requeue=requeue):
            click.echo(sentence(report))
