"""`tandem forget USER`: takes a user's transcripts out of queue, records, journal and weights."""

import os
import socket
from typing import Any

import click
import redis

from producer.connection import connect, redis_errors, resolve_url, safe_url
from producer.errors import TandemError
from worker.cli.rebuild_session import rebuild_options, rebuild_session
from worker.consumer.worker_lock import WorkerLock
from worker.orchestrator.agreement import agree
from worker.orchestrator.forgetting import Found, look, take_out
from worker.orchestrator.reports import sentence
from worker.orchestrator.unlearning import Unlearnt, unlearn

BEYOND = (
    "not looked at: backups, Redis' files on disk until it rewrites them, logs of applications, model directories that"
    " were copied away; and transcripts whose jobs have expired and whose user only their meta named (tandem rollback"
    " --drop JOB takes one out)"
)
"""What no command of ours reaches."""


@click.command()
@click.argument("user")
@click.option("--dry-run", is_flag=True, help="Say what would go. Nothing is changed; a worker may be running.")
@click.option("--redis-only", is_flag=True, help="Leave the weights and the journal as they are: no server is needed.")
@rebuild_options
def command(
    user: str,
    dry_run: bool,
    redis_only: bool,
    redis_url: str | None,
    **options: Any,
) -> None:
    """Take out everything of USER: queued transcripts, recorded completions, what was said, the journal's texts, and,
    by making the live version again without them, the weights.

    USER is the name in the requests' `user`, in feedback's, or in a transcript's meta. Stop the worker first, and start
    it again afterwards. What cannot be taken out is said; the exit code is then 1.
    """
    if not user.strip():
        raise TandemError("USER is empty: give the name that the application gave")
    connection = connect(resolve_url(redis_url), redis.Redis.from_url)
    with redis_errors(safe_url(resolve_url(redis_url))):
        found = look(connection, user)
        if dry_run:
            _say(found, "would go")
            click.echo(BEYOND)
            return
        name = f"forget-{socket.gethostname()}-{os.getpid()}"
        with WorkerLock(connection, name) as lock:
            if not redis_only and (found.trained or found.dropped or found.held):
                with rebuild_session(connection, name, **options) as session:
                    agree(connection, session)
                    found = look(connection, user)
                    unlearnt = unlearn(connection, session, [*found.trained, *found.dropped])
            else:
                found = look(connection, user)
                unlearnt = Unlearnt(still=sorted(found.trained))
            lock.renew()  # raises where it was lost meanwhile
            take_out(connection, found, [*unlearnt.still, *(found.held if redis_only else [])])
    _say(found, "gone")
    _say_unlearnt(unlearnt, redis_only)
    click.echo(BEYOND)
    if unlearnt.still or unlearnt.checkpoints:
        raise click.exceptions.Exit(1)


def _say(found: Found, fate: str) -> None:
    """One line on what there is in Redis."""
    if found.nothing:
        click.echo("nothing is known of this user")
        return
    waiting = f"{len(found.waiting)} queued transcripts"
    if found.shared:
        waiting += f" ({len(found.shared)} of them ratings of others too, who keep theirs)"
    stored = f"{len(found.stored)} transcripts of ended jobs"
    click.echo(f"{fate}: {waiting}, {stored}, {len(found.records)} recorded completions")
    if fate != "gone" and found.trained:
        versions = sorted(set(found.trained.values()))
        which = ", ".join(str(version) for version in versions[:10]) + (", ..." if len(versions) > 10 else "")
        click.echo(
            f"the live version would be made again without {len(found.trained)} transcripts, which were trained in"
            f" versions {which}"
        )


def _say_unlearnt(unlearnt: Unlearnt, redis_only: bool) -> None:
    for report in unlearnt.reports:
        click.echo(sentence(report))
    if unlearnt.batches:
        click.echo(f"gone: texts and tokens in {unlearnt.batches} batches of the journal")
    if unlearnt.still:
        why = "--redis-only was given" if redis_only else unlearnt.why
        click.echo(f"still in weights and journal: {len(unlearnt.still)} transcripts: {', '.join(unlearnt.still[:10])}")
        click.echo(f"why: {why}", err=True)
    if unlearnt.checkpoints:
        which = ", ".join(str(version) for version in unlearnt.checkpoints)
        click.echo(
            f"still in checkpoints of versions {which}: no version will be made from them any more. The worker deletes"
            " them when newer ones have taken their place, marked ones never (tandem log --unmark)"
        )
