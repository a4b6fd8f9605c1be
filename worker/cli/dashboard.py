"""`tandem dashboard`: rq-dashboard on 127.0.0.1, with Tandem's jobs readable and requeue working.

Invariants: it listens on the loopback address unless told otherwise, since it has no passwords and can delete jobs;
pages of other sites can neither read it (the Host header is checked) nor press its buttons; what a job brings along is
shown as text, never as HTML; no transcript is shown anywhere.
"""

import contextlib
import html
import ipaddress
import json
import logging
import socket
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import click
import redis
from flask import Flask, Response, abort, request
from rq_dashboard.cli import make_flask_app
from rq_dashboard.web import setup_rq_connection
from werkzeug.serving import make_server

from producer.connection import DEFAULT_URL, checked_url, connect, resolve_url, safe_url
from producer.errors import TandemError
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import announce

CONFIG = "worker.cli.dashboard_config"


def make_app(redis_url: str, names: Collection[str] = ()) -> Flask:
    """The dashboard as a Flask application on the Redis at `redis_url`; names: further host names it answers to."""
    redis_url = checked_url(redis_url)  # refused here: rq-dashboard's own error may quote it
    with connect(redis_url, redis.Redis.from_url) as client, contextlib.suppress(redis.RedisError):
        announce(open_queue(client))  # no worker may have done so yet, and producers have no right to
    app: Flask = make_flask_app(CONFIG, None, None, "")
    app.config["RQ_DASHBOARD_REDIS_URL"] = (redis_url,)
    setup_rq_connection(app)
    app.config["RQ_DASHBOARD_REDIS_URL"] = _Masked((redis_url,))
    app.before_request(lambda: refuse_strangers({"localhost", socket.gethostname(), *names}))
    app.after_request(escape_job)
    app.register_error_handler(redis.RedisError, redis_trouble)
    return app


class _Masked(tuple[str, ...]):
    """The URLs: as they are where the dashboard connects, without secrets where it lists them."""

    def __iter__(self) -> Any:
        return iter([safe_url(url) for url in super().__iter__()])


def refuse_strangers(names: Collection[str]) -> None:
    """403 for what another site's page asks for, under its own name (DNS rebinding) or ours (a form, an image)."""
    host = urlsplit(f"//{request.host}").hostname or ""
    if host not in names and not _is_address(host):
        abort(403, f"this dashboard does not answer to the name {host}: start it with --allow {host}")
    navigates = request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
    changes = request.method != "GET" or request.path.startswith("/requeue/")
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and (changes or not navigates):
        abort(403, "refused: the request comes from another site")
    origin = request.headers.get("Origin")
    if changes and origin is not None and urlsplit(origin).netloc != request.host:
        abort(403, "refused: the request comes from another site")


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def escape_job(response: Response) -> Response:
    """rq-dashboard 0.9 puts a job's metadata and error into its page as HTML: make text of it."""
    if request.endpoint == "rq_dashboard.job_info" and response.is_json:
        response.set_data(json.dumps(_escaped(response.get_json())))
    return response


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value, quote=False)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {_escaped(name): _escaped(item) for name, item in value.items()}
    return value


def redis_trouble(error: redis.RedisError) -> tuple[str, int]:
    """One plain sentence instead of a traceback."""
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return f"Redis does not answer ({type(error).__name__}); the dashboard comes back with it.", 503
    return f"Redis refused: {error}", 409  # compacting an empty queue, say


@click.command()
@click.option("--redis", "redis_url", metavar="URL", help=f"Default: $REDIS_URL, else {DEFAULT_URL}.")
@click.option("--host", default="127.0.0.1", help="Address to listen on. There is no password: do not expose it.")
@click.option("--port", type=click.IntRange(0, 65535), default=9181, help="Port; 0 takes a free one.")
@click.option("--allow", multiple=True, metavar="NAME", help="Another host name to accept, besides IP addresses.")
def command(redis_url: str | None, host: str, port: int, allow: tuple[str, ...]) -> None:
    """Run rq-dashboard: queues, jobs, workers, results, and requeueing what failed."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    redis_url = resolve_url(redis_url)
    try:
        server = make_server(host, port, make_app(redis_url, allow), threaded=True)
    except (OSError, SystemExit) as error:
        raise TandemError(f"cannot listen on {host}:{port} ({error}): choose another --port") from None
    click.echo(f"dashboard of {safe_url(redis_url)} on http://{host}:{server.server_port}/ (ends with Ctrl+C)")
    if not host.startswith("127.") and host not in ("localhost", "::1"):
        click.echo("warning: everybody who reaches this address can requeue and delete jobs", err=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
