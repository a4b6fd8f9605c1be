"""What the tests of the server share: requests over HTTP, and a trainer in a process of its own that can be killed."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from patience import PATIENCE

from worker.serving.control_client import server_state
from worker.utils.child_process import die_with_parent

TRAINER = """
import os, sys, time
from pathlib import Path
from worker.serving.control_client import ServerControl
from worker.shared_weights.attach import attach

header = attach(Path(sys.argv[1])).header
control = ServerControl(Path(sys.argv[1]), "victim")
control.connect()
print("ready", flush=True)
for line in sys.stdin:
    for step in line.split():
        if step == "pause":
            control.pause()
        elif step == "resume":
            control.resume(header.version)
        elif step == "hogwild":
            control.begin_hogwild()
        elif step == "begin":
            header.begin(control.fence)
        elif step == "finish":
            header.finish(header.version + 1)
    print("done", flush=True)
time.sleep(600)
"""

LONG = 1500
"""Tokens of a request that must still run when this process, on a busy machine, comes to look."""


class Victim:
    """A trainer process, connected, that does what `do` says (pause, resume, hogwild, begin, finish) and waits."""

    def __init__(self, run_dir: Path) -> None:
        arguments = [sys.executable, "-c", TRAINER, str(run_dir)]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        self.pid = self.process.pid
        self._expect("ready")

    def do(self, *steps: str) -> None:
        """Returns once the steps are done."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(steps) + "\n")
        self.process.stdin.flush()
        self._expect("done")

    def kill(self) -> None:
        """End it as an out-of-memory killer would."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word + "\n"


def request(
    url: str, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = PATIENCE
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body) of one HTTP request."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        headers = {"content-type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def completion(server: Any, tokens: int, stream: bool = False, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """POST /v1/completions for exactly `tokens` tokens."""
    body = {"model": str(server.model_dir), "prompt": "The quick brown fox", "max_tokens": tokens, "ignore_eos": True}
    return request(server.url, "POST", "/v1/completions", body | {"temperature": 0, "stream": stream} | more)


class Background:
    """A completion in a thread; `started` is set with its first bytes, `result()` waits for the end."""

    def __init__(self, server: Any, tokens: int, stream: bool, **more: Any) -> None:
        self.started = threading.Event()
        self._answer: tuple[int, dict[str, str], bytes] | None = None
        self._thread = threading.Thread(target=self._run, args=(server, tokens, stream, more), daemon=True)
        self._thread.start()

    def _run(self, server: Any, tokens: int, stream: bool, more: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE)
        body = {"model": str(server.model_dir), "prompt": "Once", "max_tokens": tokens, "ignore_eos": True}
        body |= more
        if stream:
            body["stream_options"] = {"include_usage": True}
        connection.request(
            "POST", "/v1/completions", json.dumps(body | {"stream": stream}), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        content = answer.read1() if stream else b""
        self.started.set()
        content += answer.read()
        self._answer = answer.status, {name.lower(): value for name, value in answer.getheaders()}, content
        connection.close()

    def result(self) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); fails if the request never ended."""
        self._thread.join(PATIENCE)
        assert self._answer is not None, "the request did not end, or its connection broke"
        return self._answer


def inside(
    server: Any, *streams: bool, at: Callable[[], object], undo: Callable[[], object], tokens: int = LONG
) -> list[Background]:
    """Requests, one for each of `streams`, that are all inside vLLM once `at()` was done.

    On a busy machine one may have ended, or not yet arrived: then `undo()` is done, and all start anew.
    """
    for _ in range(20):
        requests = [Background(server, tokens, stream) for stream in streams]
        for one, stream in zip(requests, streams, strict=True):
            assert not stream or one.started.wait(PATIENCE)
        at()
        if server_state(server.run_dir)["in_flight"] == len(requests):
            return requests
        undo()
        for one in requests:
            one.result()
    raise AssertionError("20 times a request had ended, or not arrived, when it was looked for")


class EndlessClient:
    """Streams one answer after the other, from `with` on; `answers` holds the bodies of those that ended."""

    def __init__(self, server: Any, prompt_tokens: int, tokens: int) -> None:
        self.answers: list[bytes] = []
        self._server = server
        self._body = {"prompt": [20 + 37 * n % 800 for n in range(prompt_tokens)], "stream": True}
        self._tokens = tokens
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            status, _, body = completion(self._server, self._tokens, **self._body)
            assert status == 200, body
            self.answers.append(body)

    def __enter__(self) -> "EndlessClient":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "an answer did not end"


def events(body: bytes) -> list[str]:
    """The events of an SSE body, comments included."""
    return [event for event in body.decode().split("\n\n") if event]


def token_ids(body: bytes) -> list[int]:
    """The tokens of a streamed completion that was asked with return_token_ids."""
    chunks = [json.loads(event[6:]) for event in events(body) if event.startswith("data: {")]
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or ()]


def metric(server: Any, name: str) -> float:
    """The sum of vLLM's counter `name` over its labels."""
    lines = request(server.url, "GET", "/metrics")[2].decode().splitlines()
    found = [float(line.split()[-1]) for line in lines if line.startswith(name + "{")]
    assert found, f"vLLM has no metric {name}"
    return sum(found)


def streamed_tokens(body: bytes) -> int:
    """How many tokens a streamed completion brought, by the server's count: a chunk may hold several."""
    counted = [json.loads(event[6:]).get("usage") for event in events(body) if event.startswith("data: {")]
    return max((usage["completion_tokens"] for usage in counted if usage), default=0)
