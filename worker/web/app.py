"""The dashboard as one Flask application: rq-dashboard, the view of learning, and what protects both.

Must not know: torch, vLLM.
Invariants: rq-dashboard's Tandem-specific configuration is loaded before it reads a job; nothing is changed unless
`allow_actions`.
"""

import contextlib
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import redis
from flask import Flask, Response
from jinja2 import ChoiceLoader, FileSystemLoader, PackageLoader, PrefixLoader
from rq_dashboard.cli import make_flask_app
from rq_dashboard.web import setup_rq_connection

from producer.connection import checked_url, connect, safe_url
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import announce
from worker.operations.status import impatient
from worker.utils.unix_socket import default_run_dir
from worker.web import actions, views
from worker.web.protection import READ_ONLY, add_headers, escape_job, refuse_changes, refuse_strangers
from worker.web.site import Site

CONFIG = "worker.web.dashboard_config"
TEMPLATES = Path(__file__).parent / "templates"


def make_app(
    redis_url: str,
    names: Collection[str] = (),
    *,
    run_dir: Path | None = None,
    state_dir: Path | None = None,
    allow_actions: bool = False,
    rollback_options: Sequence[str] = (),
) -> Flask:
    """The dashboard on the Redis at `redis_url` and the server of `run_dir`; names: further host names it answers to.

    state_dir: where checkpoints and their marks lie; None: asked of the server. allow_actions: whether its buttons
    work. rollback_options: more of `tandem rollback`, where the page starts it. Raises `RedisUrlError`."""
    redis_url = checked_url(redis_url)  # refused here: rq-dashboard's own error may quote it
    with connect(redis_url, impatient) as client, contextlib.suppress(redis.RedisError):
        announce(open_queue(client))  # no worker may have done so yet, and producers have no right to
    app: Flask = make_flask_app(CONFIG, None, None, "")
    app.config["RQ_DASHBOARD_REDIS_URL"] = (redis_url,)
    app.config["RQ_DASHBOARD_DISABLE_DELETE"] = not allow_actions
    setup_rq_connection(app)
    app.config["RQ_DASHBOARD_REDIS_URL"] = _Masked((redis_url,))
    # Ours before rq-dashboard's: its bar of links is wrapped in one that leads back.
    original = PrefixLoader({"original": PackageLoader("rq_dashboard")})
    app.jinja_loader = ChoiceLoader([FileSystemLoader(TEMPLATES), original])  # type: ignore[assignment]
    connection = connect(redis_url, impatient)
    site = Site(redis_url, run_dir or default_run_dir(), state_dir, allow_actions, connection, rollback_options)
    app.extensions["tandem"] = site
    known = {name.lower() for name in ("localhost", socket.gethostname(), *names)}
    app.before_request(lambda: refuse_strangers(known))
    if not allow_actions:
        app.before_request(refuse_changes)
    app.register_blueprint(views.blueprint)
    app.register_blueprint(actions.blueprint)
    app.jinja_env.globals |= {"allow_actions": allow_actions, "read_only": READ_ONLY}
    app.after_request(escape_job)
    app.after_request(add_headers)
    app.register_error_handler(redis.RedisError, redis_trouble)
    return app


class _Masked(tuple[str, ...]):
    """The URLs: as they are where the dashboard connects, without secrets where it lists them."""

    def __iter__(self) -> Any:
        return iter([safe_url(url) for url in super().__iter__()])


def redis_trouble(error: redis.RedisError) -> Response:
    """One plain sentence instead of a traceback."""
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        text, code = f"Redis does not answer ({type(error).__name__}); the dashboard comes back with it.", 503
    else:
        text, code = f"Redis refused: {error}", 409  # compacting an empty queue, say
    return Response(text, code, mimetype="text/plain")
