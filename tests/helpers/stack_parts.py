"""What the end-to-end tests share: a real Redis, a real vLLM and real `tandem worker` processes on one folder."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import torch
from patience import PATIENCE, until
from server_options import FEEDBACK_KEY

from producer import Producer, keys
from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess
from worker.utils.child_process import die_with_parent

LEARNING = ["--lr", "3e-4", "--max-length", "2048"]
if torch.cuda.is_available():
    LEARNING += ["--max-tokens", "4096"]  # fewer lengths to warm up


class Stack:
    """Redis, server and workers; `server` may be replaced by a test that killed it.

    server: one that runs already, its weights at version 0. store: its Redis.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        options: list[str],
        server: ServerProcess | None = None,
        store: RedisServer | None = None,
    ) -> None:
        self.folder, self.model, self.options = folder, model, options
        self.store = store or RedisServer(folder / "redis").start()
        self.redis = redis.Redis.from_url(self.store.url)
        self.producer = Producer(self.store.url)
        self.seen: Any = None
        """What its metrics said: `metrics_parts.Seen`."""
        self.workers: list[subprocess.Popen[str]] = []
        self.server = server or self.start_server()
        assert self.weights_version()["version"] == 0

    def start_server(self) -> ServerProcess:
        own = {"REDIS_URL": self.store.url, "TANDEM_FEEDBACK_KEY": FEEDBACK_KEY}
        self.server = ServerProcess(self.model, self.folder / "run", extra=self.options, env=own)
        return self.server

    def close(self) -> None:
        self.kill_workers()
        self.server.stop()
        self.store.stop()

    def kill_workers(self) -> None:
        """Those that a failed test has left."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()

    @property
    def environment(self) -> dict[str, str]:
        own = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.server.run_dir)}
        return os.environ | own | {"TANDEM_STATE_DIR": str(self.folder / "state")}

    def tandem(self, *arguments: str, timeout: float = PATIENCE) -> "subprocess.CompletedProcess[str]":
        """One command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=self.environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def worker(self, *options: str, fault: str | None = None) -> "subprocess.Popen[str]":
        """A `tandem worker` in the background; its output in the log that `said` reads."""
        environment = self.environment | ({"TANDEM_FAULT": fault} if fault else {})
        log = (self.folder / f"worker-{len(self.workers)}.log").open("w")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "worker", *LEARNING, *options],
                env=environment, stdout=log, stderr=log, text=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self.workers.append(process)
        return process

    def said(self, process: "subprocess.Popen[str]") -> str:
        return (self.folder / f"worker-{self.workers.index(process)}.log").read_text()

    def wait_for(self, process: "subprocess.Popen[str]", text: str) -> None:
        """Until the worker has said `text`."""
        self.wait_until(process, lambda: text in self.said(process), f"say {text!r}")

    def wait_until(
        self, process: "subprocess.Popen[str]", done: Callable[[], bool], what: str, timeout: float = PATIENCE
    ) -> None:
        """Until `done()`; an error, with all that the worker said, when it ends before or takes `timeout` seconds."""
        until(lambda: done() or process.poll() is not None, f"the worker did not {what}", timeout, pace=0.1)
        assert done(), f"the worker ended before it could {what}:\n{self.said(process)}"

    def ledger(self) -> dict[str, int]:
        return {key.decode(): int(value) for key, value in self.redis.hgetall(keys.LEDGER).items()}

    def trained_by_version(self) -> dict[int, list[str]]:
        """Version -> ids, as the manifests say: an id in two of them was trained twice."""
        versions = range(1, self.producer.version() + 1)
        return {v: json.loads(self.redis.hget(keys.manifest(v), "jobs") or "[]") for v in versions}

    def complete(self, question: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        """(status, body, headers) of a chat completion."""
        messages = [{"role": "user", "content": question}]
        return self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "temperature": 0})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        request = urllib.request.Request(
            self.server.url + path,
            json.dumps({"model": str(self.model)} | body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return reply.status, json.load(reply), lowered(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), lowered(error.headers)

    def scored(self, prompt: list[int], tokens: list[int]) -> float:
        """The served model's log-probability of `tokens` after `prompt`, in nats."""
        body = {"prompt": prompt + tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, answer, _ = self.post("/v1/completions", body)
        assert status == 200, answer
        found = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        return sum(float(at[str(token)]["logprob"]) for token, at in zip(tokens, found, strict=True))

    def weights_version(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.server.url + "/weights/version", timeout=PATIENCE) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer


def lowered(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def transcripts(prefix: str, count: int) -> list[dict[str, Any]]:
    """Short conversations with ids of their own."""
    return [
        {
            "id": f"{prefix}-{i}",
            "messages": [
                {"role": "user", "content": f"What is the number of {prefix} {i}?"},
                {"role": "assistant", "content": f"Its number is {i * 7}."},
            ],
        }
        for i in range(count)
    ]


def shared_and_private(pid: int, pattern: str) -> tuple[int, int]:
    """(mapped, private) bytes of the memory areas of process `pid` whose file name matches, from smaps."""
    mapped = private = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            inside = pattern in line
        elif inside and (field := re.match(r"^(Rss|Private_Anonymous|Anonymous): +(\d+) kB", line)):
            if field[1] == "Rss":
                mapped += int(field[2]) * 1024
            else:
                private += int(field[2]) * 1024
    return mapped, private
