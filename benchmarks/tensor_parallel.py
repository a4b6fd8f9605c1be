"""Tensor parallel: seconds of a version on one GPU and on N that share a model, memory by rank, what the server learns,
and a rank that is killed in the write.

    python benchmarks/tensor_parallel.py --size 27B --out results --until 560     # on two GPUs of one host
    python benchmarks/tensor_parallel.py --size tiny --out results                # the same on a CPU

Random weights, as files (--no-files: vLLM's own, which nobody can restore after the kill). `one` serves and trains on
the first GPU; the other parts share a server over --ranks of them. OUT/tensor_parallel_SIZE.json is whole after every
figure.

Must not know: how a model is divided.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, Worker, server_options, visible_card
from serving_loads import Load
from shapes import SIZES, write_files, write_shape
from texts import build, conversation, text_builder

from worker.data.examples import ExampleBuilder
from worker.utils import torch_setup

PARTS = ("one", "ranks", "streaming", "lost")
STREAMING = ("--apply", "streaming")


@dataclass
class Bench:
    """What the parts share. options: of every worker; server: of every server."""

    folder: Path
    model: Path
    builder: ExampleBuilder
    tokens: int
    jobs: int
    options: list[str]
    server: list[str]
    until: Until

    def rig(self, ranks: int) -> Rig:
        """Of a server over `ranks` GPUs."""
        own = self.folder / str(ranks)
        own.mkdir()
        return Rig(own, self.model, card=0 if ranks == 1 and torch.cuda.is_available() else None)

    def start(self, rig: Rig, ranks: int) -> None:
        """The server of `rig`, until it answers."""
        if ranks > 1 and not torch.cuda.is_available():
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        divided = ["--tensor-parallel-size", str(ranks)] if ranks > 1 else []
        rig.start_server([*self.server, *divided], self.until.left)

    def version(self, rig: Rig, name: str) -> dict[str, float]:
        """One version; its manifest's numbers, and seconds from the first begin to CLEAN."""
        texts = [conversation(self.builder, f"{name}-{n}", self.tokens // self.jobs) for n in range(self.jobs)]
        versions = {rig.producer.wait(one.id, 240) for one in rig.producer.enqueue_many(texts)}
        if len(versions) != 1:
            raise RuntimeError(f"{self.jobs} transcripts became {len(versions)} versions: a longer --linger is needed")
        row = rig.manifest(versions.pop())
        waited = row.get("journal_s", 0.0) + row.get("wait_for_pause_s", 0.0)
        row["step_s"] = row["gradients_s"] + waited + row["pause_s"]
        return row

    def log_probability(self, rig: Rig, name: str) -> float:
        """The server's own, in nats a trained token, of the first text of version `name`."""
        example = build(self.builder, conversation(self.builder, f"{name}-0", self.tokens // self.jobs))
        (sequence,) = example.sequences
        body = {"prompt": list(sequence.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        _, answer = rig.post("/v1/completions", body)
        said = answer["choices"][0]["prompt_logprobs"]
        found = [
            said[place][str(token)]["logprob"]
            for place, (token, trained) in enumerate(zip(sequence.ids, sequence.mask, strict=True))
            if trained
        ]
        return sum(found) / len(found)


def used(ranks: int) -> list[int]:
    """MiB in use of each of the first `ranks` GPUs, by everybody; nothing on a CPU."""
    if not torch.cuda.is_available():
        return []
    cards = ",".join(visible_card(number) for number in range(ranks))
    ask = ["nvidia-smi", "-i", cards, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()]


@contextmanager
def trained(
    bench: Bench, rig: Rig, part: Part, ranks: int, versions: int, options: Sequence[str] = ()
) -> Iterator[Worker]:
    """A worker that has made its versions; their figures are in `part`."""
    before = used(ranks)
    with rig.worker(*bench.options, *options, ready=300.0) as worker:
        part["worker ready after_s"] = worker.ready_s
        ready, name = used(ranks), f"{'-'.join(options)}{ranks}"
        text = f"timed-{name}-0"
        was = bench.log_probability(rig, text)
        bench.version(rig, f"warm-{name}")
        rows = [bench.version(rig, f"timed-{name}-{number}") for number in range(versions)]
        part["version"] = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
        part["step_s of each"] = [row["step_s"] for row in rows]
        part["tokens_per_s"] = part.figures["version"]["tokens"] / part.figures["version"]["step_s"]
        now = bench.log_probability(rig, text)
        part["the server's log-probability of a trained text"] = {"before": was, "after": now}
        part.check("the server's log-probability of a trained text has risen", now > was)
        if before:
            last = used(ranks)
            part["MiB by GPU"] = {"server": before, "with a worker that is ready": ready, "after versions": last}
            part["the worker's MiB by GPU"] = [b - a for a, b in zip(before, last, strict=True)]
        part["what the worker said"] = [line for line in worker.said().splitlines() if "version " not in line][:60]
        yield worker


def lost(bench: Bench, rig: Rig, part: Part, restorable: bool) -> None:
    """Rank 1 is killed in the write: 503 with the reason; the next start makes the version from the journal."""
    os.environ["TANDEM_FAULT_RANK_1"] = "swept"
    try:
        worker = rig.start_worker(*bench.options, *STREAMING)
    finally:
        del os.environ["TANDEM_FAULT_RANK_1"]
    worker.until("be ready", lambda: "worker ready" in worker.said(), 300.0)
    last = int(rig.producer.version())
    texts = [conversation(bench.builder, f"lost-{n}", bench.tokens // bench.jobs) for n in range(bench.jobs)]
    sent, started = rig.producer.enqueue_many(texts), time.monotonic()
    code = worker.ended(240.0)
    part["the worker ended after_s"], part["with code"] = time.monotonic() - started, code
    part["it said"] = worker.said().splitlines()[-3:]
    part.check("the worker says which rank was killed", "rank 1 (process" in worker.said() and code == 1)
    status, answer = _torn(rig)
    part["a request was answered"] = [status, json.dumps(answer)[:500]]
    part.check("503 with the reason", status == 503 and "the weights are torn" in json.dumps(answer))
    if not restorable:
        following = rig.start_worker(*bench.options, *STREAMING)
        part.check("the next start refuses", following.ended(300.0) == 1 and "nobody can restore" in following.said())
        part["the next start said"] = following.said().splitlines()[-3:]
        return
    started = time.monotonic()
    with rig.worker(*bench.options, *STREAMING, ready=400.0) as following:
        part["mended and ready after_s"] = time.monotonic() - started
        part.check("it is the next version", int(rig.producer.version()) == last + 1)
        part.check("all were trained", {rig.producer.wait(one.id, 60) for one in sent} == {last + 1})
        part.check("the server answers", rig.post("/v1/completions", {"prompt": [300, 301], "max_tokens": 1})[0] == 200)
        part["what the next start said"] = following.said().splitlines()[:60]


def _torn(rig: Rig) -> tuple[int, dict[str, Any]]:
    deadline = time.monotonic() + 60.0
    while True:
        found = rig.post("/v1/completions", {"prompt": [300, 301, 302], "max_tokens": 1}, 60.0)
        if found[0] == 503 or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="27B", show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=560.0, show_default=True, help="Seconds for all of it.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, comma-separated; in this order.")
@click.option("--files/--no-files", default=True, show_default=True, help="Whether the model has files.")
@click.option("--version-tokens", type=int, help="Tokens of a version [default: 8192; tiny: 1024].")
@click.option("--jobs", default=8, show_default=True, help="Transcripts of a version.")
@click.option("--versions", default=5, show_default=True, help="Timed versions.")
@click.option("--trainer-memory", type=float, help="GB of each GPU that vLLM leaves [default: its plan's].")
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
@click.option("--worker-option", multiple=True, help="More of `tandem worker`'s, one word each.")
def main(**o: Any) -> None:
    """Run the parts one after the other; exit code 1 if any failed."""
    names = o["parts"].split(",")
    if unknown := set(names) - set(PARTS):
        raise click.UsageError(f"--parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    outputs.folder(o["out"])
    until = Until(max(1.0, o["seconds"] - CLOSING))
    torch_setup.prepare()
    record = Record(o["out"] / f"tensor_parallel_{o['size']}.json")
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, ExitStack() as stack:
        stack.callback(until.disarm)
        try:
            bench = _bench(Path(folder), o, until)
            for ranks, group in ((1, names[:1] if names[0] == "one" else []), (o["ranks"], _after_one(names))):
                if group:
                    _on_one_server(record, bench, ranks, group, o)
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


def _after_one(names: list[str]) -> list[str]:
    return [name for name in names if name != "one"]


def _bench(folder: Path, o: dict[str, Any], until: Until) -> Bench:
    model = write_shape(o["size"], folder / "model")
    if o["files"]:
        started = time.monotonic()
        write_files(model)
        print(f"the model's files were written in {time.monotonic() - started:.1f} s", flush=True)
    tokens = o["version_tokens"] or (1024 if o["size"] == "tiny" else 8192)
    length = tokens // o["jobs"]
    server = server_options(Load.parse(f"4x{length}").longest(192), o["trainer_memory"], o["server_option"])
    if o["files"]:
        at = server.index("--load-format")
        del server[at : at + 2]
    options = ["--max-tokens", str(tokens), "--max-length", str(length), "--serving-share", "0"]
    options += ["--max-jobs", str(o["jobs"]), "--linger", "3", "--checkpoint-every", "1000", "--no-checkpoint-at-stop"]
    builder = text_builder(model)
    return Bench(folder, model, builder, tokens, o["jobs"], [*options, *o["worker_option"]], server, until)


def _on_one_server(record: Record, bench: Bench, ranks: int, names: list[str], o: dict[str, Any]) -> None:
    """The parts `names`, of which those after the first are left out where their server does not start."""
    rig = bench.rig(ranks)

    def start(part: Part) -> None:
        part["options"], started = bench.server, time.monotonic()
        bench.start(rig, ranks)
        part["start_s"] = time.monotonic() - started
        part["KV cache"] = [line for line in _log(rig) if "KV cache" in line][-3:]

    try:
        if not record.part(f"server on {ranks}", start):
            return
        for name in names:
            if name == "lost":
                record.part(name, lambda part: lost(bench, rig, part, o["files"]))
            else:
                options = STREAMING if name == "streaming" else ()
                record.part(name, lambda part: _run(bench, rig, part, ranks, o["versions"], options))  # noqa: B023
    finally:
        _keep_logs(rig, ranks, o["out"])
        rig.close()


def _run(bench: Bench, rig: Rig, part: Part, ranks: int, versions: int, options: Sequence[str]) -> None:
    with trained(bench, rig, part, ranks, versions, options):
        pass
    one = part.record.parts.get("one", {}).get("version")
    if ranks > 1 and one:
        part["times one"] = part.figures["version"]["step_s"] / one["step_s"]


def _log(rig: Rig) -> list[str]:
    log = rig.run_dir / "server.log"
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _keep_logs(rig: Rig, ranks: int, out: Path) -> None:
    for log in [*(worker.log for worker in rig.workers), rig.run_dir / "server.log"]:
        if log.exists():
            (out / f"ranks_{ranks}_{log.name}").write_bytes(log.read_bytes()[-200_000:])


if __name__ == "__main__":
    main()
