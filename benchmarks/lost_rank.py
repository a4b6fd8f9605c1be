"""A rank that is killed while it writes: what the server answers, and what the next start of the worker makes of it.

Must not know: how a model is divided. Invariant: it is killed by SIGKILL, while the server stands still for the write.
"""

import json
import os
import re
import signal
import time
import urllib.request
from typing import Any

from divided_bench import STREAMING, Bench
from record import Part
from rig import Rig, RigError, Worker

PATIENCE = 60.0
"""Seconds for a worker to end after the kill; then it is killed, too, and what follows is measured all the same."""


def lost(bench: Bench, rig: Rig, part: Part, restorable: bool) -> None:
    """Rank 1 is killed in the write: 503 with the reason; the next start makes the version from the journal."""
    worker = bench.kept or rig.start_worker(*bench.options, *STREAMING)
    bench.kept = None
    worker.until("be ready", lambda: "worker ready" in worker.said(), bench.ready())
    last, sent = _killed_in_the_write(bench, rig, worker, part)
    status, answer = _torn(rig)
    part["a request was answered"] = [status, json.dumps(answer)[:500]]
    part.check("503 with the reason", status == 503 and "the weights are torn" in json.dumps(answer))
    code = _ended(worker)
    part["with code"], part["it said"] = code, worker.said().splitlines()[-3:]
    part.check("the worker says which rank was killed", "rank 1 (process" in worker.said() and code == 1)
    if not restorable:
        following = rig.start_worker(*bench.options, *STREAMING)
        part.check("the next start refuses", following.ended(300.0) == 1 and "nobody can restore" in following.said())
        part["the next start said"] = following.said().splitlines()[-3:]
        return
    started = time.monotonic()
    with rig.worker(*bench.options, *STREAMING, ready=bench.ready()) as following:
        part["mended and ready after_s"] = time.monotonic() - started
        part.check("it is the next version", int(rig.producer.version()) == last + 1)
        part.check("all were trained", {rig.producer.wait(one, 60) for one in sent} == {last + 1})
        part.check("the server answers", rig.post("/v1/completions", {"prompt": [300, 301], "max_tokens": 1})[0] == 200)
        part["what the next start said"] = following.said().splitlines()[:200]


def _killed_in_the_write(bench: Bench, rig: Rig, worker: Worker, part: Part) -> tuple[int, list[str]]:
    """kill -9 of rank 1's trainer while a version is written: (the version before, ids of the jobs in it). What is
    written is written while the server stands still, so it is killed a moment after that began; tried again where the
    write was over by then."""
    wait = 0.3 * float(rig.manifest(int(rig.producer.version())).get("sweep_s", 0.0))
    for attempt in range(3):
        last = int(rig.producer.version())
        ids = [one.id for one in rig.producer.enqueue_many(bench.texts(f"lost-{attempt}"))]
        worker.until("begin to write", lambda: _served(rig)["state"] != "serving", 60.0)
        time.sleep(wait)
        os.kill(int(re.findall(r"rank 1 \(process (\d+)\)", worker.said())[-1]), signal.SIGKILL)
        killed = time.monotonic()
        state = _served(rig)
        while state["state"] != "torn" and not (state["state"] == "serving" and state["version"] > last):
            if worker.runs and time.monotonic() > killed + PATIENCE:
                part.check(f"the worker ends within {PATIENCE:g} s", False)
                worker.kill()
            time.sleep(0.01)
            state = _served(rig)
        if state["state"] == "torn":
            part["torn after_s"], part["in the write for_s"] = time.monotonic() - killed, wait
            part["the version before"] = last
            return last, ids
        # too late, the write was over: the worker starts its ranks again
        wait /= 3
        for one in ids:
            rig.producer.wait(one, 120)
    raise RuntimeError("three times the write was over before the rank was killed")


def _ended(worker: Worker) -> int | None:
    """Its exit code; None if it had to be killed."""
    try:
        return worker.ended(PATIENCE)
    except RigError:
        worker.kill()
        return None


def _served(rig: Rig) -> dict[str, Any]:
    with urllib.request.urlopen(f"{rig.url}/weights/version", timeout=30) as answer:
        return dict(json.load(answer))


def _torn(rig: Rig) -> tuple[int, dict[str, Any]]:
    deadline = time.monotonic() + 60.0
    while True:
        found = rig.post("/v1/completions", {"prompt": [300, 301, 302], "max_tokens": 1}, 60.0)
        if found[0] == 503 or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
