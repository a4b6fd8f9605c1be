"""`tandem diff A B`: what changed between two versions. See worker/operations/difference.py.

Invariant: stdout has the result alone; nothing of the worker's is changed, and a worker may be running.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from worker.checkpoint.state_dir import default_state_dir
from worker.cli.places import model_dir_option, run_dir_option, state_dir_option
from worker.operations import difference
from worker.operations.difference import Between, Moved
from worker.operations.evaluation import answers
from worker.operations.evaluation.answers import Answer
from worker.operations.evaluation.evaluator import open_model
from worker.utils.unix_socket import default_run_dir

SHOWN_IDS, SHOWN_ANSWERS = 20, 50
WIDTH = 300
"""Characters of an answer that are shown; --json has all."""

Said = tuple[str, Answer, Answer]


@click.command()
@click.argument("a", type=click.IntRange(0))
@click.argument("b", type=click.IntRange(0))
@click.option("--weights", is_flag=True, help="Make both versions again on the CPU, and say how far each layer moved.")
@click.option("--set", "name", help="Kept answers of this set (default: of every set that has them at both versions).")
@click.option("--answers/--no-answers", "with_answers", default=True, help="Show kept answers that changed.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@run_dir_option
@state_dir_option
@model_dir_option
def command(
    a: int,
    b: int,
    weights: bool,
    name: str | None,
    with_answers: bool,
    as_json: bool,
    run_dir: Path | None,
    state_dir: Path | None,
    model_dir: Path | None,
) -> None:
    """Say what changed from version A to version B: what was trained between them, and which kept answers changed.

    Answers are those that tandem eval --keep-answers kept at both versions. Only those that
    changed are printed.
    """
    model = open_model(run_dir or default_run_dir(), model_dir, 4096)
    state = state_dir or default_state_dir(model.directory)
    found = difference.read_between(state, model.directory, a, b)
    moved = difference.moved(state, model.directory, model.tokenizer, a, b) if weights else None
    names = [name] if name else answers.names(state)
    said = list(difference.said(state, a, b, names)) if with_answers else []
    if as_json:
        click.echo(json.dumps(_plain(a, b, found, moved, said), indent=2, default=str))
    else:
        click.echo("\n".join(_lines(a, b, found, moved, said)))


def _plain(a: int, b: int, found: Between, moved: list[Moved] | None, said: Sequence[Said]) -> dict[str, Any]:
    versions = [
        {"version": one.version, "kind": one.kind, "jobs": one.ids, "kinds": difference.kinds_of(one)}
        | {field: one.manifest.get(field) for field in ("loss", "tokens", "update_ratio", "target", "dropped")}
        for one in found.added
    ]
    weights = None if moved is None else [asdict(one) | {"relative": one.relative} for one in moved]
    texts = [{"set": name, "before": asdict(one), "after": asdict(other)} for name, one, other in said]
    plain: dict[str, Any] = {"from": a, "to": b, "versions": versions, "kinds": found.kinds, "jobs": len(found.jobs)}
    return plain | {"removed": [one.version for one in found.removed], "weights": weights, "answers": texts}


def _lines(a: int, b: int, found: Between, moved: list[Moved] | None, said: Sequence[Said]) -> Iterator[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.kinds.items()))
    of = f" ({kinds})" if kinds else ""
    yield f"version {a} -> {b}: {len(found.added):,} versions, {len(found.jobs):,} transcripts{of}"
    if found.removed:
        yield f"  not in it any more: versions {', '.join(str(entry.version) for entry in found.removed)}"
    for entry in found.added:
        loss, ratio = entry.manifest.get("loss"), entry.manifest.get("update_ratio")
        parts = [f"  {entry.version:>6} {entry.kind:<8}"]
        parts += [f"loss {loss:.4f}"] if loss is not None else []
        parts += [f"update/weight {ratio:.1e}"] if ratio is not None else []
        parts += [f"again version {entry.parent}"] if entry.kind == "rollback" else []
        more = f" +{len(entry.ids) - SHOWN_IDS}" if len(entry.ids) > SHOWN_IDS else ""
        yield "  ".join([*parts, " ".join(entry.ids[:SHOWN_IDS]) + more]).rstrip()
    if moved is not None:
        yield "weights, root mean square of the change over that of the weights (exact, from both versions):"
        yield from _table(moved)
    if said:
        yield f"answers that changed: {len(said):,}"
    for name, one, other in said[:SHOWN_ANSWERS]:
        verdict = "now exact" if other.exact else "no longer exact" if one.exact else f"wanted: {_short(one.reference)}"
        yield f"  {name} line {one.line} {one.id}: {_short(one.question)}"
        yield f"    {a}: {_short(one.answer)}"
        yield f"    {b}: {_short(other.answer)}   ({verdict})"


def _table(moved: Sequence[Moved]) -> Iterator[str]:
    layers: dict[int, list[Moved]] = {}
    for one in moved:
        if one.layer is not None:
            layers.setdefault(one.layer, []).append(one)
    for layer, parts in layers.items():
        yield f"  layer {layer:<4} " + "  ".join(f"{one.part} {one.relative:.2e}" for one in parts)
    for one in moved:
        if one.layer is None:
            yield f"  {one.part:<12} {one.relative:.2e}"


def _short(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())  # a terminal obeys the rest
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
