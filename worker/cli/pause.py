"""`tandem pause`: training waits from the next batch on; the server goes on serving."""

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from worker.versions.pause_switch import pause


@click.command("pause")
@redis_option
@click.option("--reason", default="paused by hand", help="One sentence, shown by `tandem status`.")
def command(redis_url: str | None, reason: str) -> None:
    """Pause training from the next batch on. The server goes on serving, and jobs wait in the queue."""
    url = resolve_url(redis_url)
    with redis_errors(safe_url(url)):
        pause(connect(url, redis.Redis.from_url), reason)
    click.echo("training is paused; `tandem resume` ends that")
