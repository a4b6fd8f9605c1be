"""Throws malformed input at every door: `python benchmarks/fuzz.py --cases 50000 --seed 1`.

Queue payloads, messages on both sockets, answers, shared records, headers and journal files, made by hypothesis, taken
by the real parts. Ends with what became of them, by target; fails at the first crash, hang, code run or case that is
not accounted for.
"""

import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

import hypothesis
import outputs
from fuzz_bytes import Watch
from fuzz_targets import targets
from hypothesis import HealthCheck, Phase, given, settings
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worker.testing.redis_server import RedisServer

console = Console()
CHUNK = 2000
"""Examples of one hypothesis run: it slows down with the number that it has to remember."""


def run(target: Any, cases: int, seed: int, progress: Progress) -> Counter[str]:
    """At least `cases` cases (a case of several pieces counts as so many); outcome -> count."""
    outcomes: Counter[str] = Counter()
    task = progress.add_task(target.name, total=cases)
    dice = random.Random(f"{seed}/{target.name}")
    while sum(outcomes.values()) < cases:
        left = -(-(cases - sum(outcomes.values())) // target.size)

        @hypothesis.seed(dice.getrandbits(64))
        @settings(
            max_examples=min(left, CHUNK), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=target.cases)
        def chunk(case: Any) -> None:
            found = target.take(case)
            assert sum(found.values()) == target.size, found
            outcomes.update(found)
            progress.update(task, completed=sum(outcomes.values()))

        with Watch() as seen:
            chunk()
        assert not seen, f"{target.name}: code was run: {seen}"
    return outcomes


@click.command()
@click.option("--cases", type=click.IntRange(1), default=50_000, help="In all, shared among the targets.")
@click.option("--target", "only", multiple=True, help="Only this target, such as opinions; may be repeated.")
@click.option("--seed", type=int, default=0)
@click.option("--report", type=click.Path(path_type=Path), help="Where the figures go, as JSON.")
def main(cases: int, only: tuple[str, ...], seed: int, report: Path | None) -> None:
    """See the module."""
    if report is not None:
        outputs.file(report)
    console.print(f"seed {seed}, {cases} cases")
    logging.disable(logging.ERROR)  # each refusal is logged, as it should be
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    figures: dict[str, Any] = {"seed": seed}
    with (
        tempfile.TemporaryDirectory() as name,
        RedisServer(Path(name) / "redis") as server,
        targets(server.url, Path(name)) as found,
        Progress(*columns, console=console) as progress,
    ):
        if unknown := set(only) - {target.name for target in found}:
            raise click.UsageError(f"no target {min(unknown)}; there are {', '.join(t.name for t in found)}")
        found = [target for target in found if not only or target.name in only]
        for target in found:
            started = time.monotonic()
            outcomes = run(target, -(-cases // len(found)), seed, progress)
            seconds = round(time.monotonic() - started, 1)
            figures[target.name] = {"cases": sum(outcomes.values()), "seconds": seconds, **outcomes}
    for key, value in figures.items():
        console.print(f"  {key}: {value}", markup=False)
    console.print(f"{sum(v['cases'] for v in figures.values() if isinstance(v, dict))} cases, all accounted for")
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
