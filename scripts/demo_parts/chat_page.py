"""scripts/chat.html, served on 127.0.0.1 to a browser on this machine.

Invariant: nothing but the page is served; the key of feedback is in the part of the address that no browser sends.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

PAGE = Path(__file__).parents[1] / "chat.html"


def allowing(port: int) -> list[str]:
    """The options of `tandem serve` with which a page from this port may speak to the server."""
    return ["--allowed-origins", json.dumps([f"http://127.0.0.1:{port}"])]


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = PAGE.read_bytes() if self.path in ("/", "/chat.html") else None
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        """Say nothing on the demo's terminal."""


@contextlib.contextmanager
def chat_page(server: str, key: str, port: int = 0) -> Iterator[str]:
    """The page's address, for the server at `server` and its key of feedback, until the end of the block.

    The server has to allow the page's origin: `allowing(port)`.
    """
    httpd = ThreadingHTTPServer(("127.0.0.1", port), _Page)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/#{urlencode({'server': server, 'key': key})}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
