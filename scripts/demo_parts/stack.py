"""Redis, `tandem serve` and `tandem worker` of one run, in one folder: started, spoken to, and stopped."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from demo_parts.chat_page import allowing, chat_page
from demo_parts.screen import say, show_answer, status
from producer import Producer, keys
from producer.errors import TandemError
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess, free_port
from worker.utils.child_process import die_with_parent

SERVED_NAME = "demo"
FEEDBACK = ["--record", "24", "--feedback"]
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}


def tandem(*arguments: str) -> None:
    """Run one command of ours, its progress bar on our terminal."""
    subprocess.run([sys.executable, "-m", "worker.cli", *arguments], check=True, env=os.environ | QUIET)


class DemoStack:
    """A private Redis and a server of `model`, from `with` on; `worker()` adds the worker."""

    def __init__(self, folder: Path, model: Path, server_options: Sequence[str], waiting: str) -> None:
        """waiting: what is shown until the server answers."""
        self.folder, self.model = folder, model
        self.feedback_key, self._page_port = secrets.token_hex(32), free_port()
        self.metrics = ["--metrics-port", str(free_port())]
        """Options of the worker."""
        own = ["--served-model-name", SERVED_NAME, *FEEDBACK, *allowing(self._page_port)]
        self._options, self._waiting = [*own, *server_options], waiting
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "DemoStack":
        with contextlib.ExitStack() as stack, status(self._waiting):
            self.store = stack.enter_context(RedisServer(self.folder / "redis"))
            own = {"REDIS_URL": self.store.url, "TANDEM_FEEDBACK_KEY": self.feedback_key}
            server = ServerProcess(self.model, self.folder / "run", extra=self._options, env=own)
            self.server = stack.enter_context(server)
            self.redis = stack.enter_context(contextlib.closing(redis.Redis.from_url(self.store.url)))
            self.producer = stack.enter_context(Producer(self.store.url))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def environment(self) -> dict[str, str]:
        """What a `tandem` command of this run needs."""
        places = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.server.run_dir)}
        return os.environ | QUIET | places | {"TANDEM_STATE_DIR": str(self.folder / "state")}

    @contextlib.contextmanager
    def child(self, command: str, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`tandem COMMAND` in the background, its output in a log; stopped at the end of the block."""
        with self._log(command).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", command, *options],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment, preexec_fn=die_with_parent,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(300)  # it may be writing a checkpoint
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check_alive(self, worker: "subprocess.Popen[bytes]") -> None:
        """Raise TandemError, with the end of its log, if the worker or the server has ended."""
        if worker.poll() is not None:
            log = self._log("worker").read_text(errors="replace")
            raise TandemError(f"the worker ended with exit code {worker.returncode}; its log ends:\n{log[-3000:]}")
        if not self.server.alive():
            raise TandemError(f"the server ended; its log ends:\n{self.server.tail()}")

    def said_by(self, *arguments: str) -> str:
        """What a `tandem` command of this run prints. Raises TandemError with its output if it fails."""
        command = [sys.executable, "-m", "worker.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise TandemError(f"tandem {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def manifest(self, version: int) -> dict[str, str]:
        found: Any = self.redis.hgetall(keys.manifest(version))
        return {key.decode(): value.decode() for key, value in found.items()}

    def post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """(answer, version of the weights that made it) of the OpenAI API. Raises TandemError."""
        content = json.dumps({"model": SERVED_NAME, "temperature": 0} | body).encode()
        request = urllib.request.Request(self.server.url + path, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply), reply.headers["X-Weight-Version"]
        except (urllib.error.URLError, OSError) as error:
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise TandemError(f"the server did not answer {path}: {error} {said}\n{self.server.tail()}") from error

    def ask(self, question: str) -> tuple[str, str]:
        """(answer, version of the weights that made it)."""
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 48}
        answer, version = self.post("/v1/chat/completions", body)
        return (answer["choices"][0]["message"]["content"] or "").strip(), version

    def prompt(self) -> None:
        """Ask what you like until end of input, beside a dashboard and a chat page."""
        with self.child("dashboard"), chat_page(self.server.url, self.feedback_key, self._page_port) as address:
            say(f"\nChat, with thumbs: {address}")
            say(f"Metrics: {self.server.url}/metrics (server), http://127.0.0.1:{self.metrics[1]}/metrics (worker)")
            say("How learning goes: http://127.0.0.1:9181/learning/   For another terminal:")
            for key in ("REDIS_URL", "TANDEM_RUN_DIR", "TANDEM_STATE_DIR"):
                say(f"  export {key}='{self.environment[key]}'")
            say("Ask something (end with Ctrl-D):")
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                while question := input("> "):
                    show_answer(question, *self.ask(question))

    def _log(self, command: str) -> Path:
        return self.folder / f"{command}.log"
