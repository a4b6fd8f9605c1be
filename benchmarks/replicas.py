"""Replicas: tokens a second of N GPUs against one of them, equal weights after every version, serving beside it, and a
replica that is killed and comes back.

    python benchmarks/replicas.py --size 27B --replicas 2 --out results --until 560     # N GPUs of one host
    python benchmarks/replicas.py --size tiny --replicas 2 --out results                # the same on a CPU
    python benchmarks/replicas.py --attach RUN_DIR=URL --attach RUN_DIR=URL ...         # servers that are there

Random weights; one server a GPU. In `speed` one replica and all take turns on the same servers: versions of
--version-tokens a replica, whose parts (in the manifest) say where the time went. `one` is one worker alone. Workers of
`serving` have their defaults, but for --outliers 0, as in serving.py. OUT/replicas_SIZE.json is whole after every
figure.

Must not know: how replicas meet and what they tell each other.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from fleet import Fleet, attached, served_version
from load import ClosedLoop
from memory import device_used
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, server_options
from serving_loads import Load
from shapes import SIZES, write_shape
from texts import text_builder
from transcript_clock import TranscriptClock

from worker.utils import torch_setup

PARTS = ("speed", "serving", "lost", "one")
WORKER = ("--outliers", "0")
"""Of workers under load, besides the defaults: gradients of random weights wander, and a guard would set some aside."""
TIMED = ("tokens_per_s", "itl_p50", "itl_p99", "itl_p999", "first_token_p50")
"""Of what is served, what is compared with alone."""


def one(fleet: Fleet, part: Part, versions: int) -> None:
    """A worker alone, on the first server; the first version is not timed."""
    with fleet.workers(1, 29440) as (worker,):
        fleet.version("warm-alone", 1)
        rows = [fleet.version(f"alone-{number}", 1) for number in range(versions)]
        part["version"] = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        part["step_s of each"] = [row["step_s"] for row in rows]
        part["what the worker said"] = [line for line in worker.said().splitlines() if "version " not in line][-60:]


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
    part.check("all servers have the last version", len({served_version(rig) for rig in fleet.rigs}) == 1)


def serving(fleet: Fleet, part: Part, load: Load, seconds: float, every: float) -> None:
    """All servers under `load`, alone and beside transcripts that arrive by a clock."""
    with fleet.workers(len(fleet.rigs), 29450, WORKER) as workers:
        for state in ("alone", "training"):
            part[state] = _under_load(fleet, part, state, load, seconds, every)
        part["members"] = fleet.members().plain()
        part.check("no replica's weights were ever unequal", fleet.members().unequal == 0)
    alone, training = part.figures["alone"], part.figures["training"]
    part["times alone"] = sum(row["tokens_per_s"] for row in training) / sum(row["tokens_per_s"] for row in alone)
    part["times alone, each server"] = [
        {name: beside[name] / before[name] for name in TIMED if before[name]}
        for before, beside in zip(alone, training, strict=True)
    ]
    part.check("all servers have the last version", len({served_version(rig) for rig in fleet.rigs}) == 1)
    short = {"prompt": [300, 301], "max_tokens": 1}
    part.check("all servers answer", all(rig.post("/v1/completions", short)[0] == 200 for rig in fleet.rigs))
    part["what replica 0 said"] = workers[0].said().splitlines()[-200:]


def _under_load(
    fleet: Fleet, part: Part, state: str, load: Load, seconds: float, every: float
) -> list[dict[str, float]]:
    """What each server served in `seconds`, after a fourth of them; of `training`, versions and transcripts too."""
    clock = None
    if state == "training":
        length = min(400, fleet.tokens // fleet.jobs)
        clock = TranscriptClock(fleet.rigs[0], fleet.builder, every, (length, length))
    # No prompt is one that a server has seen in the other state, and clients begin one after another, as in serving.py.
    sent, ramp = int(state == "training"), seconds / 8
    loops = [ClosedLoop(rig.url, str(rig.model), load=load, spread=0.5, turn=sent, ramp=ramp) for rig in fleet.rigs]
    with ExitStack() as stack:
        for loop in loops:
            stack.enter_context(loop)
        if clock is not None:
            stack.enter_context(clock)
        time.sleep(seconds / 4)
        first, started = fleet.rigs[0].producer.version(), time.monotonic()
        time.sleep(seconds)
        served = [loop.between(started, time.monotonic()).plain() for loop in loops]
        last = fleet.rigs[0].producer.version()
    part.check(f"no request failed, {state}", not any(loop.failures for loop in loops))
    if failures := [reason for loop in loops for _, reason in loop.failures]:
        part[f"failures, {state}"] = failures[:10]
    if clock is not None:
        made = [fleet.rigs[0].manifest(version) for version in range(first + 1, last + 1)]
        part["versions"] = len(made)
        part["a version"] = {name: statistics.median(row.get(name, 0.0) for row in made) for name in (made or [{}])[0]}
        part["transcripts"] = clock.plain()
        part.check("something was trained", len(made) > 0)
        part.check("every transcript became live", clock.plain()["live"] == clock.sent)
    return served


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
            part.check("its server has the last version", len({served_version(rig) for rig in fleet.rigs}) == 1)
            part.check("no replica's weights were unequal", fleet.members().unequal == 0)
        finally:
            again.stop()


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="27B", show_default=True)
@click.option("--replicas", default=2, show_default=True)
@click.option("--attach", multiple=True, metavar="RUN_DIR=URL", help="A server that is there; once a replica, by card.")
@click.option("--redis", "redis_url", help="A Redis that knows those servers' weights [default: a private, empty one].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=560.0, show_default=True, help="Seconds for all of it.")
@click.option("--parts", default=",".join(PARTS[:3]), show_default=True, help="Which, comma-separated; in this order.")
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
    servers = [attached(name) for name in o["attach"]]
    tokens = o["version_tokens"] or (1024 if o["size"] == "tiny" else 8192)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, ExitStack() as stack:
        stack.callback(until.disarm)
        fleet = _fleet(Path(folder), servers, tokens, o)
        for rig in fleet.rigs:
            stack.callback(rig.close)
        stack.callback(_keep_logs, fleet, o["out"])
        try:
            options = server_options(Load.parse(o["load"]).longest(192), o["trainer_memory"], o["server_option"])
            if servers or record.part("servers", lambda part: _start(fleet, part, options, until)):
                for name in o["parts"].split(","):
                    _run(record, fleet, name, o)
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


def _fleet(folder: Path, servers: Sequence[tuple[Path, str, Path]], tokens: int, o: dict[str, Any]) -> Fleet:
    """On `servers`, or on as many that are still to be started."""
    gpus, rigs = torch.cuda.is_available(), list[Rig]()
    model = servers[0][2] if servers else write_shape(o["size"], folder / "model")
    for number in range(len(servers) or o["replicas"]):
        own = folder / str(number)
        own.mkdir()
        shared = rigs[0].redis_url if rigs else o["redis_url"]
        run_dir, url, _ = servers[number] if servers else (None, "", model)
        rigs.append(Rig(own, model, run_dir=run_dir, url=url, redis_url=shared, card=number if gpus else None))
    options = ["--max-tokens", str(tokens), "--max-length", str(tokens // o["jobs"]), "--serving-share", "0"]
    return Fleet(rigs, text_builder(model), tokens, o["jobs"], options, list(o["worker_option"]))


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
    elif name == "one":
        record.part("one", lambda part: one(fleet, part, o["versions"]))
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
