"""Kills worker, server and Redis, hundreds of times, rolls back, drops and rehearses in between, and proves that
nothing was lost, trained twice or torn, and that nobody who was dropped came back.

    python benchmarks/chaos.py --kills 200 --real-vllm-kills 20 --transcripts 2000 --seed 5 --folder FOLDER

The bulk runs on a stand-in for the server (tests/helpers/stand_in.py: the same memory and sockets, no vLLM engine),
the rest on real vLLM. Started again with the same folder, it goes on where it was broken off.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "chaos"))

import outputs
from chaos_audit import Verdict, audit
from chaos_campaign import Campaign
from chaos_plan import OPTIONS, by_kind
from chaos_processes import Cluster
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console()


def campaign(
    folder: Path,
    model: Path,
    *,
    real: bool,
    seed: int,
    kills: int,
    transcripts: int,
    replicas: int = 1,
    rolling: bool = False,
) -> dict[str, Any]:
    """One campaign and its audit; the report as plain data, which is also left in the folder."""
    name = "vLLM" if real else "stand-in"
    settings = {"seed": seed, "kills": kills, "transcripts": transcripts, "server": name}
    settings |= {"replicas": replicas} if replicas > 1 else {}
    settings |= {"rolling": True} if rolling else {}
    _check_settings(folder, settings)
    cluster = Cluster(folder, model, real=real, options=OPTIONS, replicas=replicas, rolling=rolling)
    started = time.monotonic()
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            run = Campaign(cluster, seed=seed, kills=kills, transcripts=transcripts)
            task = progress.add_task(name, total=len(run.plan), completed=run.done, what="")
            run.run(lambda done, what: progress.update(task, completed=done, what=what))
            progress.update(task, what="comparing with an undisturbed run")
            verdict = audit(cluster, run.manifests, transcripts)
    finally:
        cluster.close()
    report = settings | verdict.figures | {"seconds": round(time.monotonic() - started)}
    report |= {"notes": dict(run.notes), "by kind": dict(by_kind(run.plan)), "problems": verdict.problems}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print(report, verdict)
    return report


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one campaign."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text()) != settings:
        raise click.UsageError(f"{folder} holds another campaign ({file.read_text().strip()}): name another --folder")
    file.write_text(json.dumps(settings) + "\n")


def _print(report: dict[str, Any], verdict: Verdict) -> None:
    for key, value in report.items():
        if isinstance(value, dict):
            for name, count in value.items():
                console.print(f"    {name}: {count}", markup=False)
        elif key != "problems":
            console.print(f"  {key}: {value}", markup=False)
    for problem in verdict.problems:
        console.print(f"[red]PROBLEM[/red] {problem}")
    if not verdict.problems:
        console.print(
            "[green]nothing lost, nothing twice, nothing torn, nobody dropped came back[/green];"
            " weights bitwise as undisturbed"
        )


@click.command()
@click.option("--kills", type=click.IntRange(0), default=200, help="Kills on the stand-in.")
@click.option("--real-vllm-kills", type=click.IntRange(0), default=20, help="Kills on real vLLM, besides.")
@click.option("--transcripts", type=click.IntRange(1), default=2000, help="On the stand-in; a tenth of it on vLLM.")
@click.option("--replicas", type=click.IntRange(1, 2), default=1, help="2: with a second server, killed as well.")
@click.option("--rolling", is_flag=True, help="With --replicas 2: their servers pause in turn.")
@click.option("--seed", type=int, default=0, help="Of the plan of kills.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="State and logs; goes on if it exists.")
def main(
    kills: int, real_vllm_kills: int, transcripts: int, replicas: int, rolling: bool, seed: int, folder: Path
) -> None:
    """See the module."""
    if rolling and replicas == 1:
        raise click.UsageError("--rolling goes with --replicas 2")
    from worker.testing.tiny_model import make_tiny

    console.print(f"seed {seed}, {kills} kills on the stand-in, {real_vllm_kills} on vLLM, folder {folder}")
    folder = outputs.folder(folder.absolute())
    model = folder / "model"
    if not model.exists():
        make_tiny(model)
    failed, fleet = False, {"replicas": replicas, "rolling": rolling}
    if kills:
        report = campaign(folder / "s", model, real=False, seed=seed, kills=kills, transcripts=transcripts, **fleet)
        failed |= bool(report["problems"])
    if real_vllm_kills:
        count = max(transcripts // 10, 10 * real_vllm_kills)
        report = campaign(folder / "v", model, real=True, seed=seed, kills=real_vllm_kills, transcripts=count, **fleet)
        failed |= bool(report["problems"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
