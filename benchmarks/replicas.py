"""Replicas: tokens a second of N GPUs against one of them, equal weights after every version, serving beside it, and a
replica that is killed and comes back.

    python benchmarks/replicas.py --size 27B --replicas 2 --out results --until 560     # N GPUs of one host
    python benchmarks/replicas.py --size tiny --replicas 2 --out results                # the same on a CPU

Random weights; one server a GPU. `one` and `all` take turns on the same servers: versions of --version-tokens a
replica, whose parts (in the manifest) say where the time went. OUT/replicas_SIZE.json is whole after every figure.

Must not know: how replicas meet and what they tell each other.
"""

import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from load import ClosedLoop
from memory import device_used
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, Worker, server_options
from serving_loads import Load
from shapes import SIZES, write_shape
from texts import conversation, text_builder
from transcript_clock import TranscriptClock

from worker.data.examples import ExampleBuilder
from worker.utils import torch_setup
from worker.versions import replica_status

PARTS = ("speed", "serving", "lost")


@dataclass
class Fleet:
    """Servers, one a GPU, and the workers beside them; all share the Redis of the first."""

    rigs: list[Rig]
    builder: ExampleBuilder
    tokens: int
    jobs: int
    options: list[str]

    @contextmanager
    def workers(self, count: int, rendezvous: int) -> Iterator[list[Worker]]:
        """`count` replicas that train as one, all ready; one of them is a plain worker."""
        with ExitStack() as stack:
            started = [self.start(number, count, rendezvous) for number in range(count)]
            for worker in started:
                stack.callback(worker.stop)
            started[0].until("be ready", lambda: "worker ready" in started[0].said(), 300)
            if count > 1:
                started[0].until("have all replicas", lambda: len(self.members().present) == count, 300)
            yield started

    def start(self, number: int, count: int, rendezvous: int) -> Worker:
        replica = ["--replica", f"{number}/{count}", "--rendezvous", f"127.0.0.1:{rendezvous}"] if count > 1 else []
        jobs = ["--max-jobs", str(self.jobs * count), "--linger", "3"]
        return self.rigs[number].start_worker(*self.options, *jobs, *replica)

    def members(self) -> replica_status.Members:
        store = self.rigs[0].redis
        said = {key.decode(): value.decode() for key, value in store.hgetall("weights:state").items()}
        return replica_status.read(said) or replica_status.Members()

    def version(self, name: str, count: int) -> dict[str, float]:
        """One version of `count` times `tokens`; its manifest's numbers, and seconds from the first begin to CLEAN."""
        rig, number = self.rigs[0], self.jobs * count
        texts = [conversation(self.builder, f"{name}-{n}", self.tokens // self.jobs) for n in range(number)]
        versions = {rig.producer.wait(one.id, 240) for one in rig.producer.enqueue_many(texts)}
        if len(versions) != 1:
            raise RuntimeError(f"{number} transcripts became {len(versions)} versions: a longer --linger is needed")
        row = rig.manifest(versions.pop())
        row["step_s"] = (
            row["gradients_s"] + row.get("journal_s", 0.0) + row.get("wait_for_pause_s", 0.0) + row["pause_s"]
        )
        row["tokens_per_s"] = row["tokens"] / row["step_s"]
        return row


def speed(fleet: Fleet, part: Part, versions: int, rounds: int) -> None:
    """One replica and all of them in turn."""
    found: dict[int, list[dict[str, float]]] = {1: [], len(fleet.rigs): []}
    for turn in range(rounds):
        for count, rows in found.items():
            with fleet.workers(count, 29400 + turn):
                fleet.version(f"warm-{turn}-{count}", count)
                rows += [fleet.version(f"timed-{turn}-{count}-{n}", count) for n in range(versions)]
                if count > 1:
                    part["members"] = fleet.members().plain()
                    part.check("no replica's weights were ever unequal", fleet.members().unequal == 0)
            part[f"{count} replicas"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            part["device_gb"] = device_used() / 1e9 if torch.cuda.is_available() else None
    one, every = (part.figures[f"{count} replicas"]["tokens_per_s"] for count in found)
    part["times one"] = every / one
    part.check("all servers have the last version", len({_served_version(rig) for rig in fleet.rigs}) == 1)


def serving(fleet: Fleet, part: Part, load: Load, seconds: float, every: float) -> None:
    """All servers under `load`, alone and beside transcripts that arrive by a clock."""
    with fleet.workers(len(fleet.rigs), 29450):
        for state in ("alone", "training"):
            with ExitStack() as stack:
                loops = [
                    stack.enter_context(ClosedLoop(rig.url, str(rig.model), load=load, spread=0.5))
                    for rig in fleet.rigs
                ]
                clock = None
                if state == "training":
                    length = min(400, fleet.tokens // fleet.jobs)
                    clock = stack.enter_context(TranscriptClock(fleet.rigs[0], fleet.builder, every, (length, length)))
                time.sleep(seconds / 4)
                started = time.monotonic()
                time.sleep(seconds)
                served = [loop.between(started, time.monotonic()).plain() for loop in loops]
            part[state] = served
            part.check(f"no request failed, {state}", not any(loop.failures for loop in loops))
            if clock is not None:
                part["transcripts"] = clock.plain()
                part.check("every transcript became live", part.figures["transcripts"]["live"] == clock.sent)
    alone, training = (sum(one["tokens_per_s"] for one in part.figures[state]) for state in ("alone", "training"))
    part["times alone"] = training / alone


def lost(fleet: Fleet, part: Part) -> None:
    """The last replica is killed, a version is made without it, and it comes back."""
    count = len(fleet.rigs)
    with fleet.workers(count, 29460) as workers:
        workers[-1].kill()
        started = time.monotonic()
        part["version without it"] = fleet.version("without", 1)
        part["version without it, live after_s"] = time.monotonic() - started
        part.check("it is missed", count - 1 not in fleet.members().present)
        again = fleet.start(count - 1, count, 29460)
        try:
            again.until("be there again", lambda: count - 1 in fleet.members().present, 300)
            part["there again after_s"] = again.ready_s = time.monotonic() - again.started
            part["what it said"] = again.said().splitlines()[-6:]
            fleet.version("with", count)
            part.check("its server has the last version", len({_served_version(rig) for rig in fleet.rigs}) == 1)
            part.check("no replica's weights were unequal", fleet.members().unequal == 0)
        finally:
            again.stop()


def _served_version(rig: Rig) -> Any:
    with urllib.request.urlopen(f"{rig.url}/weights/version", timeout=30) as answer:
        return json.load(answer)["version"]


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="27B", show_default=True)
@click.option("--replicas", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=560.0, show_default=True, help="Seconds for all of it.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, comma-separated; in this order.")
@click.option("--version-tokens", type=int, help="Tokens a replica of a version [default: 8192; tiny: 1024].")
@click.option("--jobs", default=8, show_default=True, help="Transcripts a replica of a version.")
@click.option("--versions", default=5, show_default=True, help="Timed versions a turn.")
@click.option("--rounds", default=2, show_default=True, help="Turns of one replica and all.")
@click.option("--load", default="8x3500", show_default=True, help="Of each server, in the serving part.")
@click.option("--every", default=3.0, show_default=True, help="Seconds between transcripts, in the serving part.")
@click.option("--serving-seconds", default=30.0, show_default=True)
@click.option("--trainer-memory", type=float, help="GB that vLLM leaves [default: its plan's].")
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
@click.option("--worker-option", multiple=True, help="More of `tandem worker`'s, one word each.")
def main(**o: Any) -> None:
    """Run the parts one after the other; exit code 1 if any failed."""
    if unknown := set(o["parts"].split(",")) - set(PARTS):
        raise click.UsageError(f"--parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    outputs.folder(o["out"])
    until = Until(max(1.0, o["seconds"] - CLOSING))
    torch_setup.prepare()
    record = Record(o["out"] / f"replicas_{o['size']}.json")
    tokens = o["version_tokens"] or (1024 if o["size"] == "tiny" else 8192)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, ExitStack() as stack:
        stack.callback(until.disarm)
        model = write_shape(o["size"], Path(folder) / "model")
        fleet = _fleet(Path(folder), model, tokens, o)
        for rig in fleet.rigs:
            stack.callback(rig.close)
        stack.callback(_keep_logs, fleet, o["out"])
        try:
            options = server_options(Load.parse(o["load"]).longest(192), o["trainer_memory"], o["server_option"])
            if record.part("servers", lambda part: _start(fleet, part, options, until)):
                for name in o["parts"].split(","):
                    _run(record, fleet, name, o)
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


def _fleet(folder: Path, model: Path, tokens: int, o: dict[str, Any]) -> Fleet:
    gpus, rigs = torch.cuda.is_available(), list[Rig]()
    for number in range(o["replicas"]):
        own = folder / str(number)
        own.mkdir()
        shared = rigs[0].redis_url if rigs else None
        rigs.append(Rig(own, model, redis_url=shared, card=number if gpus else None))
    options = ["--max-tokens", str(tokens), "--max-length", str(tokens // o["jobs"]), "--serving-share", "0"]
    return Fleet(rigs, text_builder(model), tokens, o["jobs"], [*options, *o["worker_option"]])


def _start(fleet: Fleet, part: Part, options: list[str], until: Until) -> None:
    """All servers at the same time."""
    part["options"], started = options, time.monotonic()
    for rig in fleet.rigs:
        rig.start_server(options, wait=False)
    for rig in fleet.rigs:
        assert rig.server is not None
        rig.server.wait_ready(until.left)
    part["start_s"] = time.monotonic() - started


def _run(record: Record, fleet: Fleet, name: str, o: dict[str, Any]) -> None:
    if name == "speed":
        record.part("speed", lambda part: speed(fleet, part, o["versions"], o["rounds"]))
    elif name == "serving":
        load = Load.parse(o["load"])
        record.part("serving", lambda part: serving(fleet, part, load, o["serving_seconds"], o["every"]))
    else:
        record.part("lost", lambda part: lost(fleet, part))


def _keep_logs(fleet: Fleet, out: Path) -> None:
    for number, rig in enumerate(fleet.rigs):
        logs = [*(worker.log for worker in rig.workers), rig.run_dir / "server.log"]
        for log in logs:
            if log.exists():
                (out / f"replicas_{number}_{log.name}").write_bytes(log.read_bytes()[-200_000:])


if __name__ == "__main__":
    main()
