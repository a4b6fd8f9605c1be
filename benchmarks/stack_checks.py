"""The parts of stack_27b.py: each takes what runs and writes its figures and checks into a `Part`.

Must not know: the order of the parts, the time limit. Seconds, bytes and nats throughout.
"""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from agreement import distances, redraw, served_logprobs
from load import ClosedLoop
from memory import Highest, device_used, held_by
from record import Part
from rig import Rig
from serving_loads import Load
from texts import build, conversation, text_builder
from transformers import AutoTokenizer

from worker.data.examples import Example
from worker.shared_weights.attach import AttachedWeights, attach
from worker.shared_weights.weights_client import read_header

PLAN = ("the trainer's own, total", "CUDA context and libraries")
"""Rows of the plan, as the worker logs it."""


@dataclass
class Sizes:
    """How much of everything: a version has `jobs` transcripts, `version_tokens` in all."""

    version_tokens: int
    jobs: int
    single_tokens: int
    versions: int
    singles: int
    clients: int
    lr: float
    memory: float = 12.5
    """GB that a streaming trainer may take; by default the 27B at 8,192 tokens with every layer recomputed, and a
    bit."""
    worker: list[str] = field(default_factory=list)
    """More options of `tandem worker`."""

    def options(self, apply: str) -> list[str]:
        own = ["--apply", apply, "--max-jobs", self.jobs, "--max-tokens", self.version_tokens, "--lr", self.lr]
        own += ["--serving-share", 0]  # what is timed is a version, and no rest before it
        if apply == "streaming" and torch.cuda.is_available():
            own += ["--memory", self.memory]
        return [str(word) for word in [*own, "--max-length", self.longest]] + self.worker

    @property
    def longest(self) -> int:
        return max(self.version_tokens // self.jobs, self.single_tokens)


class Stack:
    """What the parts share: the processes, and this process's own view of the weights."""

    def __init__(self, rig: Rig, sizes: Sizes) -> None:
        self.rig, self.sizes = rig, sizes
        self.tokenizer = AutoTokenizer.from_pretrained(rig.model)
        self.builder = text_builder(rig.model)
        self.weights: AttachedWeights | None = None

    def view(self) -> AttachedWeights:
        if self.weights is None:
            self.weights = attach(self.rig.run_dir)
        return self.weights

    def texts(self, prefix: str, count: int, tokens: int) -> list[dict[str, Any]]:
        return [conversation(self.builder, f"{prefix}-{number}", tokens) for number in range(count)]

    def served(self, examples: list[Example]) -> list[torch.Tensor]:
        return served_logprobs(self.rig.url, str(self.rig.model), examples)

    def load(self) -> ClosedLoop:
        load = Load.parse(f"{self.sizes.clients}x128")
        return ClosedLoop(self.rig.url, str(self.rig.model), load=load)


def open_and_redraw(stack: Stack, part: Part) -> None:
    """Another process opens every parameter, at no memory of its own, and gives the dummy weights a spread."""
    rig = stack.rig
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the context is not the weights' cost
    used, started = device_used(), time.monotonic()
    weights = stack.view()
    part["attach_s"] = time.monotonic() - started
    model = weights.build_model()
    part["attach_and_build_s"] = time.monotonic() - started
    part["tensors"] = len(weights.tensors)
    part["parameters"] = sum(tensor.numel() for tensor in weights.tensors.values())
    part["weights_bytes"] = sum(tensor.nbytes for tensor in weights.tensors.values())
    if torch.cuda.is_available():
        part["device_bytes_it_took"] = device_used() - used
        part["allocated_bytes_it_took"] = torch.cuda.memory_allocated()
        part.check(
            "attaching takes under 1 % of the weights", device_used() - used < part.figures["weights_bytes"] / 100
        )
    started = time.monotonic()
    redraw(weights, rig.run_dir, model)
    part["redraw_s"] = time.monotonic() - started


def agreement(stack: Stack, part: Part, name: str) -> None:
    """transformers on the shared views against the server, both against fp32; a wrong mapping must not pass."""
    texts = stack.texts(f"agree-{name.replace(' ', '-')}", 4, stack.sizes.single_tokens)
    examples = [build(stack.builder, text) for text in texts]
    found = distances(stack.view(), stack.tokenizer, examples, stack.served(examples))
    for who, one in asdict(found).items():
        part[who] = one
    for sentence, true in found.checks().items():
        part.check(sentence, true)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(stack: Stack, part: Part, apply: str) -> None:
    """A worker with `--apply`: versions while the server is busy, versions and single transcripts while it is not."""
    rig, sizes = stack.rig, stack.sizes
    each = sizes.version_tokens // sizes.jobs
    busy = [stack.texts(f"{apply}-busy-{n}", sizes.jobs, each) for n in range(sizes.versions)]
    quiet = [stack.texts(f"{apply}-quiet-{n}", sizes.jobs, each) for n in range(sizes.versions)]
    singles = [stack.texts(f"{apply}-single-{n}", 1, sizes.single_tokens) for n in range(sizes.singles)]
    learnt = [build(stack.builder, text) for text in (busy[0][0], quiet[0][0])]
    before = torch.cat(stack.served(learnt))
    groups = {"server": rig.server.pid} if rig.server else {}
    part["memory_without_worker"] = held_by(groups)
    used = device_used()
    with Highest() as highest, rig.worker(*sizes.options(apply)) as worker:
        part["worker_ready_s"] = worker.ready_s
        part["worker_said_at_start"] = worker.said().splitlines()
        part["memory_with_idle_worker"] = held_by(groups | {"worker": worker.pid})
        with stack.load() as load:
            time.sleep(2.0)
            started = time.monotonic()
            part["versions_while_serving"] = [version(stack, texts) for texts in busy]
            served = load.between(started, time.monotonic())
        part["served_meanwhile"] = served.plain()
        part["failed_requests"] = [reason for _, reason in load.failures]
        part.check("no request failed", not load.failures and served.tokens > 0)
        part["versions_while_quiet"] = [version(stack, texts) for texts in quiet]
        part["singles_while_quiet"] = [version(stack, texts) for texts in singles]
        part["memory_with_worker"] = held_by(groups | {"worker": worker.pid})
        part["device_bytes_beyond_the_server_at_most"] = highest.bytes - used
        _compare_with_plan(part, part.figures["versions_while_quiet"])
        if apply == "streaming":  # burst keeps gradients, as large as the weights
            _check_memory(part, stack)
    after = torch.cat(stack.served(learnt))
    part["served_logprob_before"], part["served_logprob_after"] = float(before.mean()), float(after.mean())
    part.check("the server's log-probability of the trained text has risen", bool(after.mean() > before.mean()))


def _compare_with_plan(part: Part, versions: list[dict[str, float]]) -> None:
    """What torch had allocated for a version of the planned size, and what the plan said of it, without CUDA's own."""
    said = "\n".join(part.figures["worker_said_at_start"])
    found = [re.search(rf"{name} +([\d.,]+) GB", said) for name in PLAN]
    numbers = [1e9 * float(one[1].replace(",", "")) for one in found if one]
    taken = max((row.get("peak_bytes", 0.0) for row in versions), default=0.0)
    if taken and len(numbers) == len(PLAN):
        part["planned_bytes"], part["taken_bytes"] = numbers[0] - numbers[1], taken
        part["planned_over_taken"] = (numbers[0] - numbers[1]) / taken


def _check_memory(part: Part, stack: Stack) -> None:
    """The worker holds far less than another copy of the weights, all of its process counted. Only where they are
    large: beside small ones a process's own libraries weigh more."""
    weights = sum(tensor.nbytes for tensor in stack.view().tensors.values())
    if torch.cuda.is_available() and weights > 2e9 * stack.sizes.memory:
        own = part.figures["memory_with_worker"].get("worker") or 0
        own = max(own, part.figures["device_bytes_beyond_the_server_at_most"])
        part.check("one copy of the weights: the worker holds less than half of one", own < weights / 2)
        most = stack.sizes.memory
        part.check(f"the worker's whole process stays within --memory {most}", own <= most * 1e9)


def version(stack: Stack, texts: list[dict[str, Any]], timeout: float = 240.0) -> dict[str, float]:
    """Enqueue `texts` and wait for their version: the producer's own time, and the manifest's numbers."""
    producer = stack.rig.producer
    started = time.monotonic()
    sent = producer.enqueue_many(texts)
    versions = {producer.wait(one.id, timeout) for one in sent}
    whole = time.monotonic() - started
    row: dict[str, float] = {"enqueue_to_published_s": whole, "versions": len(versions)}
    for one in sorted(versions):
        numbers = stack.rig.manifest(one)
        row |= {"version": one} | numbers
        if busy := numbers.get("gradients_s", 0.0) + numbers.get("sweep_s", 0.0):
            row["tokens_per_s"] = numbers["tokens"] / busy
    return row


def torn(stack: Stack, part: Part) -> None:
    """kill -9 in the middle of an update: nothing is served, the server says why, and the next worker refuses."""
    rig = stack.rig
    worker = rig.start_worker(*stack.sizes.options("streaming"), fault="swept")
    worker.until("be ready", lambda: "worker ready" in worker.said(), 240.0)
    rig.producer.enqueue_many(stack.texts("torn", 1, stack.sizes.single_tokens))
    part["worker_exit_code"] = worker.ended(240.0)
    part.check("the worker died by SIGKILL", part.figures["worker_exit_code"] == -9)
    part["header"] = read_header(rig.run_dir)
    part.check("the header says APPLYING", part.figures["header"]["state"] == "APPLYING")
    body = {"prompt": [300, 301, 302], "max_tokens": 1}
    answer = _until(lambda: rig.post("/v1/completions", body, 30.0), lambda found: found[0] == 503)
    part["completion"] = answer
    part.check("a completion is answered 503 with the reason", answer[0] == 503 and "torn" in str(answer[1]))
    part["health_status"] = _status(f"{rig.url}/health")
    following = rig.start_worker(*stack.sizes.options("streaming"))
    part["next_worker_exit_code"] = following.ended(240.0)
    part["next_worker_said"] = following.said().splitlines()[-3:]
    part.check("the next worker refuses", part.figures["next_worker_exit_code"] == 1)
    part.check("it says that nobody can restore dummy weights", "nobody can restore" in following.said())
    part.check("nothing was healed by it", read_header(rig.run_dir)["state"] == "APPLYING")


def _until(ask: Callable[[], Any], good: Callable[[Any], bool], timeout: float = 20.0) -> Any:
    """The first good answer, or the last one after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not good(found := ask()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
