"""Hours of mixed traffic, with a rollback and a restart of each part on the way: whether memory, Redis and the disk
stay what they are said to be, and whether all that was sent is accounted for.

    python benchmarks/soak.py --minutes 120 --transcripts 5000 --out results

A real Redis, `tandem serve` (completions are recorded, feedback is taken), `tandem worker` and `tandem dashboard` by
their defaults; a worker that ends by itself is started again, as systemd would. In the first 20 % of the time: worker,
Redis, a rollback, server, dashboard, each started again. What is compared lies after that: memory of each process in
the first and the last tenth of the rest. soak.json, soak.png.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import outputs
import redis
import soak_report
import torch
from memory import device_used, pss, tree
from record import about
from rig import ROOT, Worker
from soak_traffic import Traffic

from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess, free_port
from worker.testing.tiny_model import make_tiny
from worker.utils.child_process import die_with_parent
from worker.versions import ledger

EVERY = 10.0
"""Seconds between two looks."""
SHORTEST = 5.0
RESTART_SECONDS = 15.0
"""As docs/deploy/systemd has it."""
SETTLED = 0.45
"""The share of the time after which memory is compared. Nothing is started again after half of that: a worker that was
has then met batches of all sizes, and its memory has grown to the largest (on two busy CPUs, that took 28 minutes)."""


class Stack:
    """Redis, server, worker and dashboard in `folder`, each to be started again; the model is a tiny one or `model`."""

    def __init__(self, folder: Path, model: Path | None, worker_options: list[str], server_options: list[str]) -> None:
        self.folder, self.key = folder, secrets.token_hex(32)
        self.worker_options, self.server_options = worker_options, server_options
        self.on_gpu = torch.cuda.is_available()
        self.model = model or folder / "model"
        if model is None:
            make_tiny(self.model, vision=self.on_gpu, real_heads=self.on_gpu)
        self.store = RedisServer(folder / "redis").start()
        self.redis = redis.Redis.from_url(self.store.url)
        self.port, self.dashboard_port, self.metrics_port = free_port(), free_port(), free_port()
        self.count = 0
        self.start_server()
        self.start_worker()
        self.start_dashboard()

    @property
    def environment(self) -> dict[str, str]:
        places = {"REDIS_URL": self.store.url, "TANDEM_RUN_DIR": str(self.folder / "run")}
        return os.environ | places | {"TANDEM_STATE_DIR": str(self.folder / "state"), "TANDEM_FEEDBACK_KEY": self.key}

    def start_server(self) -> None:
        options = ["--max-model-len", "2048", "--max-num-seqs", "16", "--served-model-name", "soak"]
        options += ["--record", "1", "--feedback"]
        if self.on_gpu:
            options += ["--language-model-only", "--gdn-prefill-backend", "triton", "--load-format", "dummy"]
        options += self.server_options
        self.server = ServerProcess(
            self.model, self.folder / "run", port=self.port, extra=options, env=self.environment
        )

    def start_worker(self) -> None:
        self.count += 1
        options = ["--metrics-port", str(self.metrics_port), *self.worker_options]
        self.worker = Worker(options, self.environment, self.folder / f"worker-{self.count}.log")
        self.worker.until("be ready", lambda: "worker ready" in self.worker.said(), 600)

    def start_dashboard(self) -> None:
        with (self.folder / "dashboard.log").open("ab") as log:
            self.dashboard = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", "dashboard", "--port", str(self.dashboard_port)],
                stdout=log, stderr=log, env=self.environment, cwd=ROOT, preexec_fn=die_with_parent,
            )  # fmt: skip

    def restart(self, part: str) -> None:
        """worker, redis, server or dashboard; "rollback": to three versions ago, the worker stopped meanwhile."""
        if part == "redis":
            self.store.stop()
            self.store.start()
        elif part == "dashboard":
            self.dashboard.terminate()
            self.dashboard.wait(30)
            self.start_dashboard()
        else:
            if part == "server":
                self.server.stop()
                self.worker.ended(300)  # it says that the server is gone
                self.start_server()
            if part == "rollback":
                self.worker.until("make four versions", lambda: ledger.state(self.redis).version > 3, 300)
            self.worker.stop(300)
            if part == "rollback":
                target = ledger.state(self.redis).version - 3
                command = [sys.executable, "-m", "worker.cli", "rollback", str(target)]
                subprocess.run(command, env=self.environment, cwd=ROOT, check=True, capture_output=True)
            self.start_worker()

    def supervise(self) -> str | None:
        """What a worker said that ended by itself, after it was started again; None if it runs."""
        if self.worker.runs:
            return None
        said = self.worker.said().splitlines()[-1:]
        time.sleep(RESTART_SECONDS)
        self.start_worker()
        return said[0] if said else "nothing"

    def look(self) -> dict[str, Any]:
        """Bytes by process (with its children), of Redis and on disk, and the version."""
        pids = {"server": self.server.pid, "worker": self.worker.pid}
        pids |= {"redis": self.store.pid, "dashboard": self.dashboard.pid}
        found: dict[str, Any] = {name: sum(map(pss, tree(pid))) for name, pid in pids.items()}
        info: Any = self.redis.info()
        found |= {"redis used": info["used_memory"], "redis keys": self.redis.dbsize()}
        found |= {"redis disk": size(self.folder / "redis"), "state": size(self.folder / "state")}
        version = ledger.state(self.redis).version
        return found | {"version": version, "device": device_used(), "ledger": self.redis.hlen("weights:ledger")}

    def ask_pages(self) -> None:
        """As an operator's browser and a Prometheus do."""
        asked = ((self.dashboard_port, "/learning/"), (self.port, "/metrics"), (self.metrics_port, "/metrics"))
        for port, path in asked:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).read()
            except OSError:
                continue  # it is being started again

    def close(self) -> None:
        self.worker.stop(300)
        self.dashboard.kill()
        self.dashboard.wait()
        self.server.stop()
        self.store.stop()


def size(folder: Path) -> int:
    """Bytes of all files below it; files that go meanwhile count nothing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total


def soak(stack: Stack, traffic: Traffic, seconds: float, report: dict[str, Any], out: Path) -> None:
    """Look every EVERY seconds, and start a part again when its time has come."""
    plan = {0.04: "worker", 0.07: "redis", 0.1: "rollback", 0.15: "server", 0.2: "dashboard"}
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        for share in [share for share in plan if passed >= share * seconds]:
            part = plan.pop(share)
            began = time.monotonic()
            stack.restart(part)
            event = {"at": passed, "what": part, "took": time.monotonic() - began}
            report["events"].append(event)
            print(f"{passed / 60:.1f} min: {part}, {event['took']:.1f} s", flush=True)
        if (said := stack.supervise()) is not None:
            report["events"].append({"at": passed, "what": "worker ended", "said": said})
            print(
                f"{passed / 60:.1f} min: the worker ended by itself and was started again; it said: {said}", flush=True
            )
        stack.ask_pages()
        look = {"at": passed, "sent": traffic.sent()} | stack.look()
        report["looks"].append(look)
        if len(report["looks"]) % 30 == 1:
            held = ", ".join(f"{name} {look[name] / 1e6:.1f}" for name in soak_report.PARTS)
            print(f"{passed / 60:.1f} min, version {look['version']}, {look['sent']} sent; MB: {held}", flush=True)
            soak_report.save(report, out)
        time.sleep(max(0.0, EVERY - (time.monotonic() - started - passed)))


def account(stack: Stack, traffic: Traffic, patience: float) -> dict[str, Any]:
    """What became of all that was sent, once the queue is empty."""
    ids = sorted({*traffic.queued, *traffic.said})
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        states = [stack.redis.hget(f"rq:job:{one}", "status") for one in ids]
        if all(state in (b"finished", b"failed") for state in states):
            break
        time.sleep(2)
    versions = ledger.versions(stack.redis, ids)
    failed = [one for one, state in zip(ids, states, strict=True) if state == b"failed"]
    lost = [one for one, state in zip(ids, states, strict=True) if state != b"failed" and one not in versions]
    strangers = stack.redis.hlen("weights:ledger") - len(versions)
    found = {"transcripts": len(ids), "trained": len(versions), "refused": len(failed), "lost": lost[:20]}
    return found | {"in the ledger and not sent": strangers, "calls": dict(sorted(traffic.answers.items()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--transcripts", type=int, default=5000, help="queued by an application, besides HTTP's")
    parser.add_argument("--model", type=Path, help="a model directory (default: a tiny Qwen3.5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--worker-option", action="append", default=[], help="for `tandem worker`, as --worker-option=X"
    )
    parser.add_argument("--server-option", action="append", default=[], help="for vLLM, as --server-option=X")
    parser.add_argument("--folder", type=Path, help="where the parts live (default: a temporary folder)")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.minutes < SHORTEST:
        parser.error(f"--minutes must be {SHORTEST:g} or more: starting each part again takes most of less")
    outputs.folder(chosen.out)
    seconds = chosen.minutes * 60
    report: dict[str, Any] = {"about": about(), "seconds": seconds, "events": [], "looks": []}
    with tempfile.TemporaryDirectory(prefix="tandem-") as made:
        folder = chosen.folder or Path(made)
        stack = Stack(folder, chosen.model, chosen.worker_option, chosen.server_option)
        try:
            traffic = Traffic(
                lambda: stack.server.url, "soak", stack.key, stack.store.url,
                seed=chosen.seed, seconds=seconds * 0.97, transcripts=chosen.transcripts,
            )  # fmt: skip
            with traffic:
                soak(stack, traffic, seconds, report, chosen.out)
            report["accounts"] = account(stack, traffic, 600)
        finally:
            stack.close()
    report["verdict"] = soak_report.verdict(report, SETTLED)
    soak_report.save(report, chosen.out)
    print(json.dumps(report["verdict"] | {"accounts": report["accounts"]}, indent=1))
    return 0 if report["verdict"]["flat"] and not report["accounts"]["lost"] else 1


if __name__ == "__main__":
    sys.exit(main())
