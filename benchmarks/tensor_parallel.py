"""Tensor parallel: seconds of a version on one GPU and on N that share a model, memory by rank, what the server learns,
and a rank that is killed in the write.

    python benchmarks/tensor_parallel.py --size 27B --out results --until 560     # on two GPUs of one host
    python benchmarks/tensor_parallel.py --size tiny --out results                # the same on a CPU

Random weights, as files (--no-files: vLLM's own, which nobody can restore after the kill; --model: a directory that
`shapes.py SIZE DIR --files` wrote before). `one` serves and trains on the first GPU; the other parts share a server
over --ranks of them, and `lost` kills a rank of the worker of the part before it, if that streams.
OUT/tensor_parallel_SIZE.json is whole after every figure.

Must not know: how a model is divided.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
from divided_bench import STREAMING, Bench, used
from lost_rank import lost
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, server_options
from serving_loads import Load
from shapes import SIZES, write_files, write_shape
from texts import text_builder

from worker.utils import torch_setup

PARTS = ("one", "ranks", "streaming", "lost")


def trained(
    bench: Bench, rig: Rig, part: Part, ranks: int, versions: int, options: Sequence[str] = (), keep: bool = False
) -> None:
    """A worker makes its versions; their figures are in `part`. keep: it goes on as `bench.kept`."""
    before = used(ranks)
    with ExitStack() as stack:
        worker = rig.start_worker(*bench.options, *options)
        stack.callback(worker.stop)
        worker.until("be ready", lambda: "worker ready" in worker.said(), bench.ready())
        part["worker ready after_s"] = time.monotonic() - worker.started
        ready, name = used(ranks), f"{'-'.join(options)}{ranks}"
        text = f"timed-{name}-0"
        was = bench.log_probability(rig, text)
        bench.version(rig, f"warm-{name}")
        rows = list[dict[str, float]]()
        for number in range(versions):
            rows.append(bench.version(rig, f"timed-{name}-{number}"))
            part.keep("step_s of each", [row["step_s"] for row in rows])
        part["version"] = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
        part["step_s of each"] = part.figures["step_s of each"]
        part["tokens_per_s"] = part.figures["version"]["tokens"] / part.figures["version"]["step_s"]
        if ranks > 1 and bench.one:
            part["times one"] = part.figures["version"]["step_s"] / bench.one
        now = bench.log_probability(rig, text)
        part["the server's log-probability of a trained text"] = {"before": was, "after": now}
        part.check("the server's log-probability of a trained text has risen", now > was)
        if before:
            last = used(ranks)
            part["MiB by GPU"] = {"server": before, "with a worker that is ready": ready, "after versions": last}
            part["the worker's MiB by GPU"] = [b - a for a, b in zip(before, last, strict=True)]
        part["what the worker said"] = [line for line in worker.said().splitlines() if "version " not in line][:200]
        if keep:
            bench.kept = worker
            stack.pop_all()


@click.command()
@click.option("--size", type=click.Choice(SIZES), default="27B", show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=560.0, show_default=True, help="Seconds for all of it.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, comma-separated; `one` is first.")
@click.option("--files/--no-files", default=True, show_default=True, help="Whether the model has files.")
@click.option("--model", type=click.Path(path_type=Path), help="A directory with a model's files [default: written].")
@click.option("--one", "one_s", type=float, help="Seconds of a version on one GPU, if `one` is left out.")
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
            for ranks, group in ((1, ["one"] if "one" in names else []), (o["ranks"], _after_one(names))):
                if group:
                    _on_one_server(record, bench, ranks, group, o)
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


def _after_one(names: list[str]) -> list[str]:
    return [name for name in names if name != "one"]


def _bench(folder: Path, o: dict[str, Any], until: Until) -> Bench:
    model = o["model"] or write_shape(o["size"], folder / "model")
    if o["files"] and not o["model"]:
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
    return Bench(folder, model, builder, tokens, o["jobs"], [*options, *o["worker_option"]], server, until, o["one_s"])


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
        for name, following in zip(names, [*names[1:], ""], strict=True):
            if name == "lost":
                record.part(name, lambda part: lost(bench, rig, part, o["files"]))
                continue
            keep = name == "streaming" and following == "lost"
            options = STREAMING if name == "streaming" else ()
            record.part(name, lambda part: trained(bench, rig, part, ranks, o["versions"], options, keep))  # noqa: B023
            if name == "one" and "version" in record.parts["one"]:
                bench.one = record.parts["one"]["version"]["step_s"]
    finally:
        _keep_logs(rig, ranks, o["out"])
        rig.close()


def _log(rig: Rig) -> list[str]:
    log = rig.run_dir / "server.log"
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _keep_logs(rig: Rig, ranks: int, out: Path) -> None:
    for log in [*(worker.log for worker in rig.workers), rig.run_dir / "server.log"]:
        if log.exists():
            (out / f"ranks_{ranks}_{log.name}").write_bytes(log.read_bytes()[-200_000:])


if __name__ == "__main__":
    main()
