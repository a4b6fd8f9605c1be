"""`tandem resume`: training goes on that was paused."""

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.versions.pause_switch import resume


@click.command("resume")
@redis_option
def command(redis_url: str | None) -> None:
    """Resume training after the canary set, or a person, paused it."""
    url = resolve_url(redis_url)
    with redis_errors(safe_url(url)):
        reason = resume(connect(url, redis.Redis.from_url))
    click.echo("training was not paused" if reason is None else f"training goes on; it was paused: {reason}")
