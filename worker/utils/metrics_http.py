"""A small HTTP server for one registry of metrics: GET /metrics, in a thread of its own.

Must not know: torch, vLLM, Redis.
Invariants: it ends with its block; a client that sends nothing is let go after a few seconds.
"""

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from producer.errors import TandemError

CLIENT_SECONDS = 10.0
"""How long a client may be silent."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 16


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, *_: Any) -> None:
        """Nothing: a scrape every few seconds is no news."""


@contextlib.contextmanager
def serve(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Serve `registry` on `host`:`port` (0: a free one) within the block; gives the URL. Raises TandemError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        kind = type("Server", (_Server,), {"address_family": family})
        server = kind(address[:2], _Handler)
    except OSError as error:
        raise TandemError(
            f"--metrics-port: cannot listen on {host}:{port} ({error.strerror}): another program, or another"
            " worker, has it; choose another port, or 0 for a free one"
        ) from None
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="tandem-metrics-http", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
