"""What holds for every route of the dashboard: who may ask, what may change, what a browser may load.

Must not know: torch, Redis.
Invariants: pages of other sites can neither read the dashboard (the Host header is checked) nor press its buttons;
without `allow_actions` no route changes anything; what a job brings along is shown as text, never as HTML.
"""

import hashlib
import hmac
import html
import ipaddress
import json
import secrets
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from flask import Response, abort, request

READ_ONLY = "this dashboard is read-only: start it with `tandem dashboard --allow-actions` to change anything from it"
OURS = "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
"""The Content-Security-Policy of the learning view: no script and no style but its own files."""
THEIRS = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""rq-dashboard's pages are made of inline scripts and templates; still no other host is asked."""
RAW = {"rq_dashboard.job_info", "rq_dashboard.list_jobs", "rq_dashboard.list_queues", "rq_dashboard.list_workers"}
"""Answers whose values rq-dashboard 0.9 puts into its pages as HTML: ids, names, metadata, errors."""
ESCAPED_THERE = {"rq_dashboard.list_jobs": ("description", "exc_info")}
"""Fields that its page makes text of itself."""


def refuse_strangers(names: Collection[str]) -> None:
    """403 for what another site's page asks for, under its own name (DNS rebinding) or ours (a form, an image).

    names: in lower case, as a host is compared."""
    host = urlsplit(f"//{request.host}").hostname or ""
    if host not in names and not _is_address(host):
        abort(403, f"this dashboard does not answer to the name {host}: start it with --allow {host}")
    navigates = request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and (changes() or not navigates):
        abort(403, "refused: the request comes from another site")
    origin = request.headers.get("Origin")
    if changes() and origin is not None and urlsplit(origin).netloc != request.host:
        abort(403, "refused: the request comes from another site")
    if changes() and request.method in (
        "GET",
        "HEAD",
    ):  # an image's, say, from another port of this host, without an Origin
        abort(403, "refused: ask for it with POST")


def changes() -> bool:
    """Whether the request is for a route that changes something: rq-dashboard requeues a whole queue on a GET."""
    return request.method not in ("GET", "HEAD", "OPTIONS") or request.path.startswith("/requeue/")


def refuse_changes() -> None:
    """403 for all of them: for a dashboard without --allow-actions."""
    if changes():
        abort(403, READ_ONLY)


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def escape_job(response: Response) -> Response:
    """What rq-dashboard would put into its page as HTML (`RAW`) as text."""
    endpoint = request.endpoint or ""
    if endpoint in RAW and response.is_json:
        quote = endpoint != "rq_dashboard.job_info"  # which shows JSON in no attribute
        response.set_data(json.dumps(_escaped(response.get_json(), quote, ESCAPED_THERE.get(endpoint, ()))))
    return response


def _escaped(value: Any, quote: bool, left: Collection[str] = ()) -> Any:
    if isinstance(value, str):
        return html.escape(value, quote=quote)
    if isinstance(value, list):
        return [_escaped(item, quote, left) for item in value]
    if isinstance(value, dict):
        return {
            _escaped(name, quote): item if name in left and isinstance(item, str) else _escaped(item, quote, left)
            for name, item in value.items()
        }
    return value


def add_headers(response: Response) -> Response:
    """What a browser may load, embed and keep. The referrer stays: without it a form's Origin would be null."""
    theirs = (request.endpoint or "").startswith("rq_dashboard.")
    response.headers["Content-Security-Policy"] = THEIRS if theirs else OURS
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    if not (request.endpoint or "").endswith("static"):
        response.headers["Cache-Control"] = "no-store"
    return response


class Tokens:
    """What a form has to send along, so that only a page of this process can have asked for it; one for each action."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, action: str) -> str:
        return hmac.new(self._secret, action.encode(), hashlib.sha256).hexdigest()

    def check(self, action: str, token: str) -> None:
        """403 unless `token` was given out for `action`."""
        if not hmac.compare_digest(self.of(action).encode(), token.encode()):
            abort(403, "refused: this form is not from this dashboard, or from before it was started; open it again")
