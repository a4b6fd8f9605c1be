"""`tandem status`: one true line about queue, weights, worker and server, and the details below it.

Must not know: torch, vLLM. Changes nothing it looks at.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from producer.cli import redis_option
from producer.connection import resolve_url
from worker.cli.places import run_dir_option
from worker.operations.status import ago_text, gather
from worker.utils.unix_socket import default_run_dir


def line(status: dict[str, Any]) -> str:
    """version 12, 2 min ago (8 jobs, 3,214 tokens, loss 1.23) · 5 queued, 8 training, 1 failed · worker busy · ..."""
    parts = []
    if "version" in status:
        update = status["last_update"]
        numbers = [f"{update['jobs']:.0f} jobs"] if update and update.get("jobs") else []
        if update and "tokens" in update:
            numbers.append(f"{update['tokens']:,.0f} tokens")
        if update and "loss" in update:
            numbers.append(f"loss {update['loss']:.4f}")
        ago = f", {ago_text(update['age_s'])}" if update and update["age_s"] is not None else ""
        what = f" ({', '.join(numbers)})" if numbers else ""
        parts.append(f"version {status['version']}{ago}{what}")
        queue = status["queue"]
        parts.append(f"{queue['queued']} queued, {queue['started']} in hand, {queue['failed']} failed")
        if status.get("lost_count"):
            parts[-1] += f", {status['lost_count']:,} lost"
        parts.append(f"worker {status['worker']['state']}{' (paused)' if status.get('hold') else ''}")
        if replicas := status.get("replicas"):
            parts.append(f"{len(replicas['present'])} of {replicas['count']} replicas")
        if status["worker"].get("serving_share") is not None:
            kept_, asked = status["worker"]["serving_kept"], status["worker"]["serving_share"]
            parts.append(f"serving kept {100 * kept_:.1f} % of the last minute, asked for {100 * asked:.4g} %")
        parts.append(f"eviction {status['eviction']['policy']}")
    else:
        parts.append("Redis unreachable" if not status["redis"]["reachable"] else "Redis unreadable")
    server = status["server"]
    at = f" version {server['version']}" if "version" in server else ""
    parts.append(f"server {server['state']}{at}")
    return " · ".join(parts)


def replicas_line(replicas: dict[str, Any]) -> str:
    """0, 1 at version 12; 2 not there; lost 3 times, unequal once"""
    at: dict[int, list[int]] = {}
    for number, version in sorted(replicas["present"].items()):
        at.setdefault(version, []).append(number)
    parts = [f"{_listed(numbers)} at version {version}" for version, numbers in sorted(at.items(), reverse=True)]
    if missing := [number for number in range(replicas["count"]) if number not in replicas["present"]]:
        parts.append(f"{_listed(missing)} not there")
    times = [f"{name} {_times(replicas[name])}" for name in ("lost", "unequal") if replicas[name]]
    return "; ".join([*parts, *([", ".join(times)] if times else [])])


def waited_line(one: dict[str, Any]) -> str:
    """rank 1 (process 4711), 42 s so far, which computes"""
    return f"rank {one['rank']} (process {one['pid']}), {one['seconds']:.0f} s so far, which {one['doing']}"


@click.command()
@redis_option
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def command(redis_url: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Show the state of queue, weights, worker and server, in one line and then in detail, and what is wrong.

    Exit code 1: something is missing or wrong.
    """
    status = gather(resolve_url(redis_url), run_dir or default_run_dir())
    if as_json:
        click.echo(json.dumps(status, indent=2, default=str))
    else:
        click.echo(line(status))
        for name in ("queue", "last_update", "canary", "worker", "replicas", "server"):
            if found := status.get(name):
                click.echo(f"  {name:12}{replicas_line(found) if name == 'replicas' else _shown(found)}")
        for one in status.get("waiting", []):
            click.echo(f"  {'waiting':12}for {waited_line(one)}")
        for problem in status["problems"]:
            click.echo(f"  ! {problem}")
    if status["problems"]:
        raise SystemExit(1)


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in found.items() if value is not None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(os.linesep, " ")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
