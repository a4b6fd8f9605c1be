"""`tandem eval FILE`: is it getting better? See worker/operations/evaluation.

Must not take the worker's lock. Invariant: stdout has the result alone; remarks and progress go to stderr.
"""

import json
import os
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import click
import redis

from producer.cli import format_option, redis_option
from producer.connection import connect, redis_errors, resolve_url, safe_url
from producer.errors import TandemError
from worker.checkpoint.state_dir import default_state_dir
from worker.cli.places import model_dir_option, run_dir_option, state_dir_option
from worker.operations.evaluation import tables
from worker.operations.evaluation.cases import CaseSet, read_cases
from worker.operations.evaluation.comparison import compare
from worker.operations.evaluation.evaluator import Evaluator, Result, open_model
from worker.operations.evaluation.live import Server
from worker.utils.unix_socket import default_run_dir
from worker.versions import evaluations

URL = "http://127.0.0.1:8000"
KEY_ENV = "VLLM_API_KEY"


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--name", help="The set's name in Redis, in metrics and on the page. Default: the file's.")
@click.option("--at", "version", type=click.IntRange(0), metavar="VERSION", help="This version, not the live one.")
@click.option(
    "--compare",
    "pair",
    type=click.IntRange(0),
    nargs=2,
    metavar="A B",
    help="Both versions, and what changed from A to B: conversation by conversation, with 95 % intervals.",
)
@click.option("--offline", is_flag=True, help="With --at or --compare: compute what is stored or live, too.")
@click.option("--answers/--no-answers", default=True, help="Ask for greedy answers: exact match needs them.")
@click.option("--keep-answers", is_flag=True, help="Write the answers to the state directory, for tandem diff.")
@click.option("--store/--no-store", default=True, help="Keep the figures in Redis, with their version.")
@click.option("--history", is_flag=True, help="Also list what is stored of this set, by version.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@format_option(help="The file's format, as for tandem enqueue.")
@click.option("--max-length", type=click.IntRange(16), default=4096, help="Longest conversation, in tokens.")
@click.option("--url", default=URL, show_default=True, help="Where the server answers HTTP.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help=f"File with the server's --api-key. Default: ${KEY_ENV}."
)
@redis_option
@run_dir_option
@state_dir_option
@model_dir_option
def command(
    file: BufferedReader,
    name: str | None,
    version: int | None,
    pair: tuple[int, int] | None,
    offline: bool,
    answers: bool,
    keep_answers: bool,
    store: bool,
    history: bool,
    as_json: bool,
    format_name: str,
    max_length: int,
    url: str,
    api_key_file: Path | None,
    redis_url: str | None,
    run_dir: Path | None,
    state_dir: Path | None,
    model_dir: Path | None,
) -> None:
    """Say how well a version does on the conversations in FILE: loss, exact match, and of preference pairs the win
    rate.

    The live version is asked over HTTP; a worker may be running. A version that was evaluated while it was live is
    looked up; any other is made again in this machine's memory, from checkpoint and journal, and run on the CPU.

    FILE may be of any format that tandem enqueue reads. Nothing in it is trained.
    """
    _check(version, pair, offline, answers, keep_answers)
    name = evaluations.checked_name(name or _name_of(file.name))
    key = _key(api_key_file)
    model = open_model(run_dir or default_run_dir(), model_dir, max_length)
    state = state_dir or default_state_dir(model.directory)
    cases = read_cases(file, model.builder, format_name)
    for kind, count in cases.left_out.items():
        click.echo(f"note: {count:,} left out: {kind}, which holds no answer to give", err=True)
    connection = connect(resolve_url(redis_url), redis.Redis.from_url) if store or history else None
    with redis_errors(safe_url(resolve_url(redis_url))):
        if connection is not None:
            connection.ping()
        server = Server(url, model.decode, key)
        ours = connection if store else None
        evaluator = Evaluator(cases, name, model, server, ours, state, answers=answers, keep=keep_answers)
        if pair is not None:
            plain, lines = _compared(evaluator, pair, cases, offline)
        else:
            result = evaluator.live() if version is None else evaluator.at(version, again=offline)
            plain, lines = _one(result, cases, name)
        if history and connection is not None:
            past = evaluations.of_set(connection, name)
            plain["history"] = [one.plain() for one in past]
            lines += ["stored:", *tables.history_lines(past, cases.digest)]
    if as_json:
        click.echo(json.dumps(plain, indent=2))
    else:
        click.echo("\n".join(lines))
    if evaluator.unstored:
        raise SystemExit(1)


def _one(result: Result, cases: CaseSet, name: str) -> tuple[dict[str, Any], list[str]]:
    """One version, for programs and for people."""
    for remark in result.remarks:
        click.echo(f"note: {remark}", err=True)
    assert result.scores is not None
    whole = result.whole
    versions = sorted(set(result.versions))
    each = zip(cases.cases, result.scores, result.versions, strict=True)
    plain: dict[str, Any] = {"set": name, "file": cases.file, "versions": versions, "left_out": cases.left_out}
    if whole is not None:
        lines = list(tables.evaluation_lines(whole, f"{whole.where}, stored at {whole.at}" if result.stored else ""))
    else:  # of several versions: the figures are of no one
        whole = evaluations.evaluation(name, versions[-1], "", cases.digest, result.scores, "live")
        span = f"at versions {versions[0]} to {versions[-1]}, each conversation at its own"
        lines = [f"{name} {span}:", *list(tables.evaluation_lines(whole))[1:]]
        plain["mixed"] = True
    plain |= whole.plain() | {"from_store": result.stored, "remarks": result.remarks}
    if plain.get("mixed"):
        plain |= {"version": None, "lineage": None}
    plain["cases"] = [tables.score_plain(*one) for one in each]
    lines += tables.score_lines(cases.cases, result.scores, result.versions)
    return plain, lines


def _compared(
    evaluator: Evaluator, pair: tuple[int, int], cases: CaseSet, offline: bool
) -> tuple[dict[str, Any], list[str]]:
    """Two versions, for programs and for people."""
    results = [evaluator.at(version, again=offline) for version in pair]
    wholes, scores = [], []
    for result in results:
        for remark in result.remarks:
            click.echo(f"note: {remark}", err=True)
        assert result.whole is not None and result.scores is not None, "at() is of one version"
        wholes.append(result.whole)
        scores.append(result.scores)
    (before, after), found = wholes, compare(*scores)
    plain = tables.comparison_plain(before, after, found)
    plain["cases"] = list(_pairs(cases, *scores))
    return plain, list(tables.comparison_lines(before, after, found))


def _pairs(cases: CaseSet, before: list[Any], after: list[Any]) -> Iterator[dict[str, Any]]:
    for case, a, b in zip(cases.cases, before, after, strict=True):
        change = {"before": a.loss, "after": b.loss, "change": b.loss - a.loss}
        yield {"line": case.line, "id": case.id, "tokens": a.tokens, "loss": change, "exact": [a.exact, b.exact],
               "won": [a.won, b.won]}  # fmt: skip


def _check(version: int | None, pair: Any, offline: bool, answers: bool, keep_answers: bool) -> None:
    if version is not None and pair is not None:
        raise TandemError("--at and --compare each say which versions: name one of them")
    if offline and version is None and pair is None:
        raise TandemError("--offline is for --at VERSION and --compare A B: the live version is asked of the server")
    if keep_answers and not answers:
        raise TandemError("--keep-answers keeps the greedy answers: leave out --no-answers")


def _name_of(file: str) -> str:
    if file == "<stdin>" or file == "-":
        raise TandemError("a set that comes from standard input needs a name: --name NAME")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(file).name.split(".")[0] or "set")[:64]


def _key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(KEY_ENV) or None
    try:
        return path.read_text().strip()
    except OSError as error:
        raise TandemError(f"--api-key-file {path} cannot be read ({error.strerror})") from None
