"""A man in the middle of a Redis connection: the real Redis behind a port that changes what some replies say.

For what no Redis here can be: an old one, one whose clock is off.
"""

import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

Change = Callable[[bytes], bytes]
"""Makes of one piece of what Redis sends what the client gets, of the same length."""


def old_redis(data: bytes) -> bytes:
    """INFO of Redis 6 or 7, as version 6."""
    return re.sub(rb"redis_version:\d", b"redis_version:6", data)


def hours_ahead(data: bytes) -> bytes:
    """TIME, two hours later."""
    return re.sub(rb"\*2\r\n\$10\r\n(\d{10})\r\n", lambda m: b"*2\r\n$10\r\n%d\r\n" % (int(m[1]) + 7200), data)


@contextmanager
def between(url: str, change: Change) -> Iterator[str]:
    """The URL of a port in front of the Redis at `url`, a unix:// URL with a password."""
    parts = urlsplit(url)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as inside:
                inside.connect(unquote(parts.path))
                back = threading.Thread(target=_forward, args=(inside, self.request, change))
                back.start()
                _forward(self.request, inside, lambda data: data)
                back.join()

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that server_close waits for them
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"redis://:{parts.password}@127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _forward(source: socket.socket, target: socket.socket, change: Change) -> None:
    """Until the source ends. Redis sends a reply in few pieces, and none of those changed here is near an end."""
    try:
        while data := source.recv(1 << 20):
            target.sendall(change(data))
    except OSError:
        pass
    finally:
        try:
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
