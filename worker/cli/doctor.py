"""`tandem doctor`: one line for each thing that can be wrong, and how to mend it.

Must not know: torch, vLLM. Changes nothing it looks at; no line has a password or a transcript in it.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from producer.cli import redis_option
from producer.connection import resolve_url
from worker.cli.doctor_sentences import line, sentence
from worker.cli.places import run_dir_option, state_dir_option
from worker.operations.doctor.examination import Subject, examine
from worker.operations.doctor.finding import Fact, Finding, Level
from worker.utils.unix_socket import default_run_dir


@click.command()
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM FLAGS]")
@redis_option
@run_dir_option
@state_dir_option
@click.option(
    "--only", "checks", multiple=True, metavar="CHECK", help="Only the check of exactly this name. May be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def command(
    flags: tuple[str, ...],
    redis_url: str | None,
    run_dir: Path | None,
    state_dir: Path | None,
    checks: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check Redis, server, worker, packages, state directory, disk, sockets and clock; say what is wrong and how to
    mend it.

    Run it as the worker's user, on its machine. After `--`: flags for vLLM that you mean to serve with; without them,
    those of the running server are checked. Exit code 1: there is a fault.
    """
    folder = (run_dir or default_run_dir()).absolute()
    subject = Subject(resolve_url(redis_url), folder, state_dir, flags, os.environ)
    found, answers = [], False
    for finding in examine(subject):
        answers |= finding.fact == Fact.REDIS_ANSWERS
        if checks and finding.check not in checks:
            continue
        found.append(finding)
        if not as_json:
            click.echo(line(finding, folder))
    if unknown := set(checks) - {finding.check for finding in found}:
        why = "" if answers else " (those of Redis are not made while it does not answer)"
        raise click.BadParameter(f"no check is called {', '.join(sorted(unknown))}{why}", param_hint="--only")
    faults = sum(finding.level == Level.FAULT for finding in found)
    if as_json:
        click.echo(json.dumps({"faults": faults, "findings": [_plain(finding, folder) for finding in found]}, indent=2))
    if faults:
        raise SystemExit(1)


def _plain(finding: Finding, run_dir: Path) -> dict[str, object]:
    what, mend = sentence(finding, run_dir)
    return asdict(finding) | {"what": what, "mend": mend}
