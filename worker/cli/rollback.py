"""`tandem rollback VERSION [--drop JOB...]`: the live server goes back to an older version."""

import os
import socket
from typing import Any

import click
import redis

from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.cli.rebuild_session import rebuild_options, rebuild_session
from worker.consumer.worker_lock import WorkerLock
from worker.orchestrator.agreement import agree
from worker.orchestrator.reports import sentence
from worker.orchestrator.rollback import roll_back


@click.command()
@click.argument("version", type=click.IntRange(0))
@click.option("--drop", multiple=True, metavar="JOB", help="Leave this transcript out permanently. May be repeated.")
@click.option("--requeue", is_flag=True, help="Queue the transcripts of later versions again, except --drop.")
@click.option("--reason", default="", help="For the manifest.")
@rebuild_options
def command(
    version: int,
    drop: tuple[str, ...],
    requeue: bool,
    reason: str,
    redis_url: str | None,
    **options: Any,
) -> None:
    """Bring the live server back to VERSION, as a new version. Stop the worker first, and start it again afterwards."""
    name = f"rollback-{socket.gethostname()}-{os.getpid()}"
    connection = connect(resolve_url(redis_url), redis.Redis.from_url)
    with (
        redis_errors(safe_url(resolve_url(redis_url))),
        WorkerLock(connection, name),
        rebuild_session(connection, name, **options) as session,
    ):
        agree(connection, session)
        for report in roll_back(connection, session, version, drop, reason=reason, requeue=requeue):
            click.echo(sentence(report))
