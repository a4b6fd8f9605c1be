"""What a benchmark of several servers finds out about those that are there already."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from fleet import attached
from patience import PATIENCE


class Models(BaseHTTPRequestHandler):
    """vLLM's list of models, of one that was started as NAME=ROOT: /NAME=ROOT/v1/models."""

    def do_GET(self) -> None:
        name, _, root = self.path.removeprefix("/").removesuffix("/v1/models").partition("=")
        body = json.dumps({"data": [{"id": name.replace("|", "/"), "root": root.replace("|", "/")}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(PATIENCE)


def test_a_server_that_is_there_says_its_model(url: str, tmp_path: Path) -> None:
    at = f"{url}/|models|27B=|models|27B"
    assert attached(f"{tmp_path}={at}") == (tmp_path, at, Path("/models/27B"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{here}", "write RUN_DIR=URL"),
        ("{here}/none={url}", "is no directory"),
        ("{here}=http://127.0.0.1:1", "does not answer"),
        ("{here}={url}/chat=|models|27B", "serves /models/27B as chat: start it without --served-model-name"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(url: str, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(click.BadParameter, match=said) as refused:
        attached(name.format(here=tmp_path, url=url))
    assert refused.value.param_hint == "--attach"
