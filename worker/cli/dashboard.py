"""`tandem dashboard`: the page on 127.0.0.1: a view of learning, and rq-dashboard with Tandem's jobs readable.

Invariants: it listens on the loopback address unless told otherwise, since it has no passwords; it changes nothing
unless told that it may.
"""

import logging
import shlex
from pathlib import Path

import click
from werkzeug.serving import make_server

from producer.cli import redis_option
from producer.connection import resolve_url, safe_url
from producer.errors import TandemError
from worker.cli.places import run_dir_option, state_dir_option
from worker.web.app import make_app
from worker.web.site import Site


@click.command()
@redis_option
@click.option("--host", default="127.0.0.1", help="Address to listen on. There is no password: do not expose it.")
@click.option("--port", type=click.IntRange(0, 65535), default=9181, help="Port; 0 takes a free one.")
@click.option("--allow", multiple=True, metavar="NAME", help="Another host name to accept, besides IP addresses.")
@click.option(
    "--allow-actions",
    is_flag=True,
    help="Let everybody who opens the page pause, resume, roll back, and requeue and delete jobs. Without it"
    " everything is read-only, rq-dashboard's buttons too.",
)
@click.option(
    "--rollback-options",
    default="",
    metavar="TEXT",
    help="Options for `tandem rollback` when the page starts it. On a GPU: the worker's --apply, --memory and"
    " --max-tokens.",
)
@run_dir_option
@state_dir_option
def command(
    redis_url: str | None,
    host: str,
    port: int,
    allow: tuple[str, ...],
    allow_actions: bool,
    rollback_options: str,
    run_dir: Path | None,
    state_dir: Path | None,
) -> None:
    """Serve the page: how learning goes (/learning/), and rq-dashboard: queues, jobs, workers, results."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    redis_url = resolve_url(redis_url)
    try:
        more = shlex.split(rollback_options)
    except ValueError as error:
        raise click.UsageError(f"--rollback-options: {error}") from None
    places = {"run_dir": run_dir, "state_dir": state_dir}
    app = make_app(redis_url, allow, allow_actions=allow_actions, rollback_options=more, **places)
    try:
        server = make_server(host, port, app, threaded=True)
    except (OSError, SystemExit) as error:
        raise TandemError(f"cannot listen on {host}:{port} ({error}): choose another --port") from None
    address = f"http://{host}:{server.server_port}/"
    click.echo(f"dashboard of {safe_url(redis_url)} on {address} (ends with Ctrl+C); learning: {address}learning/")
    if not host.startswith("127.") and host not in ("localhost", "::1"):
        what = "pause, roll back, and requeue and delete jobs" if allow_actions else "see all jobs and versions"
        click.echo(f"warning: everybody who reaches this address can {what}", err=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    site: Site = app.extensions["tandem"]
    if (running := site.rollbacks.progress()) is not None and running.code is None:
        click.echo(f"waiting for the rollback to version {running.target} to end", err=True)
        site.rollbacks.wait()
