"""Records which candidates of kernels win on this card, and what a cold warm-up takes with and without that table.

    python benchmarks/tuned_kernels.py --size 27B --also 9B,0.8B --out FOLDER
    cp FOLDER/tuned_kernels.json worker/trainer/        # ships it; what it had of other cards is kept

Each part is a process of its own with cold caches (Triton's and TileLang's), on a model of few layers: what a kernel is
tuned by are sizes of heads and rows, not depth. tuned: the trainer's warm-up without a table, which is then recorded.
table: the same with that table. again (--warm): once more, with the caches of the part before. Then, with the table,
what is new in the sizes of --also is tuned and recorded. 4B and 35B-A3B tune as 9B does, 2B as 0.8B. No server, random
weights.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from record import OutOfTime, Part, Record, Until
from shapes import SIZES

from worker.trainer.tuned_table import SHIPPED, read, table_for, write

SAME = 0.03
"""What two runs of the same step may differ by."""


@contextmanager
def compile_times() -> Iterator[dict[str, Any]]:
    """What Triton compiles meanwhile, and TileLang's first call: {"kernels", "seconds", "slowest", "tilelang_s"}."""
    import triton
    from fla.ops.common.backends.tilelang import CommonTileLangBackend as Backend

    found: dict[str, Any] = {"kernels": 0, "seconds": 0.0, "slowest": []}
    call = Backend.chunk_bwd_dqkwg

    def compiled(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found["kernels"] += 1
            found["seconds"] += times.total / 1e6
            found["slowest"] = sorted([*found["slowest"], (round(times.total / 1e6, 2), src.name)], reverse=True)[:8]

    def first_timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments, **options)
        found.setdefault("tilelang_s", round(time.perf_counter() - started, 2))
        return result

    triton.knobs.compilation.listener, Backend.chunk_bwd_dqkwg = compiled, first_timed
    try:
        yield found
    finally:
        triton.knobs.compilation.listener, Backend.chunk_bwd_dqkwg = None, call


def warmed(size: str, options: dict[str, Any], known: Path | None, table: Path) -> dict[str, Any]:
    """One warm-up in this process, and steps after it. known: the file of the table to use; what was chosen is added
    to the file `table`."""
    import triton
    from short_rows import steps
    from trainer_bench import Bench

    from worker.data.batch_capacity import sizes_up_to
    from worker.trainer.device import growing_segments
    from worker.trainer.kernel_warmup import warm_up
    from worker.trainer.parallel_compile import parallel_compile
    from worker.trainer.tuned_kernels import card_of, tuned_kernels
    from worker.utils import torch_setup

    torch_setup.prepare()
    device, started = torch.device("cuda", 0), time.monotonic()
    with growing_segments():
        torch.empty(1, device=device)
    sizes = sizes_up_to(options["tokens"])
    bench = Bench(size, sizes[-1], device, options["memory"], options["layers"])
    trainer, card = bench.trainer("streaming", sizes, sizes[-1]), card_of(device)
    found: dict[str, Any] = {"card": card.name, "triton": triton.__version__, "model_s": time.monotonic() - started}
    wanted = None if known is None else table_for(read(known), card, triton.__version__)
    with compile_times() as compiles, parallel_compile() as compiled, tuned_kernels(wanted) as tuned:
        report = warm_up(trainer)
    write(table, [*(read(table) if table.exists() else []), tuned.recorded(card, triton.__version__)])
    found |= {"warm_up_s": sum(report.seconds.values()), "by_part_s": report.seconds, "compiled": compiles}
    found |= {"known": tuned.known, "tuned": tuned.timed, "candidates": compiled.candidates}
    found |= {"threads": compiled.threads}
    for tokens in (sizes[0], sizes[-1]):
        found[f"step of {tokens} tokens"] = steps(bench, trainer, [tokens], options["rounds"])
    bench.close()
    return found


class Child:
    """Runs `warmed` in new processes, each with the caches of `folder`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-cold-"))

    def __call__(self, size: str, *, known: bool, cold: bool = True) -> dict[str, Any]:
        if cold:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
        caches = {"TRITON_CACHE_DIR": f"{self.folder}/triton", "TILELANG_CACHE_DIR": f"{self.folder}/tilelang"}
        result, options = self.folder / "result.json", self.options
        command = [sys.executable, __file__, "--size", size, "--out", str(options["out"]), "--child", str(result)]
        for name in ("layers", "tokens", "memory", "rounds"):
            command += [f"--{name}", str(options[name])]
        command += ["--known"] if known else []
        subprocess.run(command, env=os.environ | caches, check=True)
        return dict(json.loads(result.read_text()))


def compared(part: Part, name: str, step: dict[str, float], before: dict[str, float]) -> None:
    """A step with the table against one that was tuned in its own process."""
    ratio = step["step_s"] / before["step_s"]
    part[f"{name}, of the tuned one"] = ratio
    part.check(f"{name} takes what the tuned one takes, within {SAME:.0%}", abs(ratio - 1) <= SAME)


def run(record: Record, child: Child, size: str, also: list[str], warm: bool) -> None:
    tuned: dict[str, Any] = {}

    def keep(part: Part, found: dict[str, Any]) -> None:
        for key, value in found.items():
            part[key] = value

    def without(part: Part) -> None:
        tuned.update(child(size, known=False))
        keep(part, tuned)

    def with_table(part: Part, cold: bool = True) -> None:
        found = child(size, known=True, cold=cold)
        keep(part, found)
        part.check("no kernel was tuned", found["tuned"] == 0 and found["candidates"] == 0)
        for name in (key for key in found if key.startswith("step of ")):
            compared(part, name, found[name], tuned[name])

    def more(part: Part, other: str) -> None:
        keep(part, child(other, known=True))

    record.part(f"{size}, tuned", without)
    record.part(f"{size}, table", with_table)
    if warm:
        record.part(f"{size}, again", lambda part: with_table(part, cold=False))
    for other in also:
        record.part(f"{other}, recorded", lambda part, other=other: more(part, other))  # type: ignore[misc]


@click.command()
@click.option("--size", default="27B", type=click.Choice(SIZES), show_default=True)
@click.option("--also", default="9B,0.8B", show_default=True, help="Sizes whose winners are added; comma-separated.")
@click.option("--layers", default=8, show_default=True, help="Of the models; a multiple of 4.")
@click.option("--tokens", default=8192, show_default=True, help="Of the longest row; the shorter ones are run as well.")
@click.option("--memory", default=22.0, show_default=True, help="GB for the trainer, weights aside.")
@click.option("--rounds", default=7, show_default=True, help="Steps that are timed, of each length.")
@click.option("--warm", is_flag=True, help="Also a start with warm caches.")
@click.option("--seconds", default=290.0, show_default=True, help="For all of it; what is known by then is kept.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--known", is_flag=True, hidden=True, help="Of a part: use the table in --out.")
@click.option("--child", type=click.Path(path_type=Path), hidden=True, help="Run one part; its figures' file.")
def main(**options: Any) -> None:
    """OUT/tuned_kernels.json is the shipped table with what was recorded; OUT/tuned_warmup.json has the figures."""
    if not torch.cuda.is_available():
        raise click.UsageError("kernels are tuned on a GPU, and this machine has none")
    options["out"].mkdir(parents=True, exist_ok=True)
    table = options["out"] / "tuned_kernels.json"
    if options["child"]:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        found = warmed(options["size"], options, table if options["known"] else None, table)
        options["child"].write_text(json.dumps(found))
        return
    if not table.exists():
        shutil.copy(SHIPPED, table)
    record, until = Record(options["out"] / "tuned_warmup.json"), Until(options["seconds"])
    child = Child(options)
    try:
        run(record, child, options["size"], [size for size in options["also"].split(",") if size], options["warm"])
    except OutOfTime:
        print("the time is over: what is missing was not run", flush=True)
    finally:
        until.disarm()
        shutil.rmtree(child.folder, ignore_errors=True)
    record.summary()
    sys.exit(not all(part.get("ok") for part in record.parts.values()))


if __name__ == "__main__":
    main()
