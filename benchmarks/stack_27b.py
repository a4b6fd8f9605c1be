"""The whole at a real size on one GPU: server, attach, agreement, versions through Redis in both ways, a kill.

    python benchmarks/stack_27b.py --size 27B --out results --until 560
    python benchmarks/stack_27b.py --size tiny --out results      # the same script on a CPU; or tiny-llama

One server (random weights, CUDA graphs on) for all parts. Each part stands by itself: what fails is recorded, and the
next one runs. OUT/stack_SIZE.json is whole after every figure. Everything that is started ends with this script.
"""

import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import outputs
import serving
import stack_checks
from record import OutOfTime, Part, Record, Until
from rig import CLOSING, Rig, server_options
from serving_loads import Load
from shapes import OTHERS, SIZES, TINY, write_shape
from stack_checks import Sizes, Stack

from worker.utils import torch_setup

PARTS = ("redraw", "agreement", "streaming", "burst", "serving", "torn")


@click.command()
@click.option("--size", type=click.Choice(SIZES + OTHERS), default="27B", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), help="Folder of the results.")
@click.option("--until", "seconds", type=float, default=560.0, show_default=True, help="Seconds for all of it.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which, comma-separated; in this order.")
@click.option("--trainer-memory", type=float, help="GB that vLLM leaves [default: its plan's].")
@click.option("--max-model-len", default=4096, show_default=True)
@click.option("--version-tokens", type=int, help="Tokens of a version [default: 8192; tiny: 1024].")
@click.option("--jobs", default=8, show_default=True, help="Transcripts of a version.")
@click.option("--single-tokens", type=int, help="Tokens of a single transcript [default: 512; tiny: 128].")
@click.option("--versions", default=3, show_default=True, help="Versions while serving, and as many while quiet.")
@click.option("--singles", default=5, show_default=True)
@click.option("--clients", default=4, show_default=True, help="Concurrent requests beside training.")
@click.option("--memory", default=12.5, show_default=True, help="GB of a streaming trainer, its context included.")
@click.option("--lr", default=3e-5, show_default=True)
@click.option("--serving-seconds", default=10.0, show_default=True, help="Of each phase of the serving part.")
@click.option("--every", default=3.0, show_default=True, help="Seconds between the serving part's transcripts.")
@click.option("--server-option", multiple=True, help="More of vLLM's, one word each.")
@click.option("--worker-option", multiple=True, help="More of `tandem worker`'s, one word each.")
def main(
    size: str,
    out: Path,
    seconds: float,
    parts: str,
    trainer_memory: float | None,
    max_model_len: int,
    version_tokens: int | None,
    jobs: int,
    single_tokens: int | None,
    versions: int,
    singles: int,
    clients: int,
    memory: float,
    lr: float,
    serving_seconds: float,
    every: float,
    server_option: tuple[str, ...],
    worker_option: tuple[str, ...],
) -> None:
    """Run the parts one after the other; exit code 1 if any failed."""
    if unknown := set(parts.split(",")) - set(PARTS):
        raise click.UsageError(f"--parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    tiny = size in TINY
    sizes = Sizes(
        version_tokens=version_tokens or (1024 if tiny else 8192),
        jobs=jobs,
        single_tokens=single_tokens or (128 if tiny else 512),
        versions=versions,
        singles=singles,
        clients=clients,
        lr=lr,
        memory=memory,
        worker=list(worker_option),
    )
    outputs.folder(out)
    until = Until(max(1.0, seconds - CLOSING))
    torch_setup.prepare()
    record = Record(out / f"stack_{size}.json")
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        rig = Rig(Path(folder), write_shape(size, Path(folder) / "model"))
        try:
            options = server_options(max_model_len, trainer_memory, server_option, qwen=size in SIZES)
            if record.part("server", lambda part: start(rig, part, options, until)):
                stack = Stack(rig, sizes)
                lengths = (single_tokens or sizes.single_tokens,) * 2
                phases = serving.Phases(serving_seconds, max(2.0, serving_seconds / 5), every=every, lengths=lengths)
                run(record, stack, parts.split(","), phases)
        except OutOfTime:
            print("the time is over: what is missing was not run", flush=True)
        finally:
            until.disarm()
            keep(rig, out, size)
            rig.close()
    record.summary()
    sys.exit(0 if all(part.get("ok") for part in record.parts.values()) else 1)


def start(rig: Rig, part: Part, options: list[str], until: Until) -> None:
    part["options"] = options
    started = time.monotonic()
    rig.start_server(options, until.left)
    part["start_s"] = time.monotonic() - started
    said = (rig.run_dir / "server.log").read_text(errors="replace").splitlines()
    part["memory"] = [line for line in said if "leaves at least" in line or "Available KV cache memory" in line]


def run(record: Record, stack: Stack, parts: list[str], phases: serving.Phases) -> None:
    """The parts that were asked for, in the order of PARTS."""

    def agree(name: str) -> None:
        if "agreement" in parts:
            record.part(f"agreement, {name}", lambda part: stack_checks.agreement(stack, part, name))

    if "redraw" in parts:
        record.part("attach and redraw", lambda part: stack_checks.open_and_redraw(stack, part))
    agree("before any update")
    for apply in ("streaming", "burst"):
        if apply in parts:
            record.part(f"worker, {apply}", lambda part, apply=apply: stack_checks.train(stack, part, apply))
            agree(f"after {apply} updates")
    if "serving" in parts:
        loads = [Load.parse(f"{stack.sizes.clients}x{length}") for length in (128, 3500)]
        serving.measure(stack.rig, stack.builder, "keep", loads, phases, record)
    if "torn" in parts:
        record.part("killed in mid-update", lambda part: stack_checks.torn(stack, part))


def keep(rig: Rig, out: Path, size: str) -> None:
    """The logs, beside the results."""
    logs = [worker.log for worker in rig.workers] + [rig.run_dir / "server.log"]
    for log in logs:
        if log.exists():
            (out / f"stack_{size}_{log.name}").write_bytes(log.read_bytes())


if __name__ == "__main__":
    main()
