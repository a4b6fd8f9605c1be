"""`tandem log`: the versions of the weights, newest first: what went into each, its loss, where there are checkpoints.

From Redis' manifests; where Redis is away or has none, from the journal. Reads only, but for --mark and --unmark, which
say of a checkpoint that it is kept for good. Must not know: torch, the server.
Invariants: it takes no lock, so that it works beside a worker; what cannot be read is said, never left out silently.
"""

import json
from pathlib import Path
from typing import Any

import click
import redis

from producer.cli import redis_option
from producer.connection import connect, resolve_url
from producer.errors import TandemError
from worker.checkpoint import record_file, records
from worker.checkpoint.state_dir import replace
from worker.cli.places import run_dir_option, state_dir_option
from worker.operations.checkpoints import checkpoints
from worker.operations.checkpoints import state_dir as find_state_dir
from worker.operations.history import rolled_back
from worker.utils.unix_socket import default_run_dir
from worker.versions import ledger

SHOWN_IDS = 3
"""How many ids a line names before it counts the rest."""


def versions_from_redis(connection: redis.Redis, count: int) -> list[dict[str, Any]]:
    """The manifests that Redis has of the newest `count` versions, newest first. Raises redis errors."""
    newest = ledger.state(connection).version
    found = []
    for version in range(newest, max(0, newest - count), -1):
        raw: dict[str, Any] = dict(ledger.manifest(connection, version))
        if not raw:  # trimmed, or one of several that a run without Redis made
            continue
        for name in ("jobs", "dropped", "abandoned", "requeued"):
            raw[name] = json.loads(raw.get(name) or "[]")
        found.append(raw | {"version": version})
    return found


def versions_from_journal(folder: Path, count: int) -> list[dict[str, Any]]:
    """The same from the journal's files, as far back as they go. Raises `JournalError`."""
    found: dict[int, dict[str, Any]] = {}
    files = sorted(folder.glob("*.journal"))
    for path in files:
        for _, record in record_file.scan(path, last=path == files[-1]).records:
            records.check_format(record, path)
            version, kind = int(record.get("version", 0)), record["kind"]
            if kind == "void":
                found.pop(version, None)
            elif kind == "done" and version in found:
                found[version] |= record["manifest"] | {"jobs": found[version]["jobs"]}
            elif kind in ("update", "rollback", "lineage"):
                shown = {"version": version, "kind": kind, "lineage": record["lineage"]}
                found[version] = dict(record.get("manifest", {})) | shown | {"jobs": record.get("ids", [])}
    return [found[version] for version in sorted(found, reverse=True) if version][:count]


def line(manifest: dict[str, Any], marks: dict[int, str]) -> str:
    """12  2026-11-23T16:39:31  update    8 jobs  3,214 tokens  loss 1.2345  [checkpoint]  a-1 a-2 a-3 +5"""
    version = manifest["version"]
    parts = [f"{version:>6}", str(manifest.get("at", ""))[:19].ljust(19), str(manifest.get("kind", "?")).ljust(8)]
    if manifest.get("kind") == "rollback":
        parts.append(f"to {manifest.get('target')}")
        if manifest.get("dropped"):
            parts.append(f"without {_some(manifest['dropped'])}")
    if manifest.get("jobs"):
        parts.append(f"{len(manifest['jobs']):>3} jobs")
        parts.append(f"{int(float(manifest.get('tokens') or 0)):>7,} tokens")
    if manifest.get("loss") is not None:
        parts.append(f"loss {float(manifest['loss']):.4f}")
    if version in marks:
        parts.append(f"[checkpoint{': ' + marks[version] if marks[version] else ''}]")
    if manifest.get("jobs"):
        parts.append(_some(manifest["jobs"]))
    return "  ".join(parts)


def gone(manifests: list[dict[str, Any]]) -> set[int]:
    """Versions among them that a later rollback took out of the weights."""
    back = [m for m in manifests if m.get("kind") == "rollback"]
    return rolled_back((manifest["version"], int(manifest.get("target", 0))) for manifest in back)


def _some(ids: list[Any]) -> str:
    more = len(ids) - SHOWN_IDS
    return " ".join(map(str, ids[:SHOWN_IDS])) + (f" +{more}" if more > 0 else "")


@click.command()
@click.option("-n", "--count", type=click.IntRange(1), default=20, help="How many versions (default: 20).")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object a line.")
@click.option("--mark", type=click.IntRange(1), metavar="VERSION", help="Keep this version's checkpoint for good.")
@click.option("--name", default="kept", help="What the mark says (with --mark).")
@click.option("--unmark", type=click.IntRange(1), metavar="VERSION", help="Remove the mark of this checkpoint.")
@redis_option
@run_dir_option
@state_dir_option
def command(
    count: int,
    as_json: bool,
    mark: int | None,
    name: str,
    unmark: int | None,
    redis_url: str | None,
    run_dir: Path | None,
    state_dir: Path | None,
) -> None:
    """List versions, newest first: when, what, transcripts, tokens, loss, checkpoints."""
    state = find_state_dir(state_dir, run_dir or default_run_dir())
    for version, text in ((mark, name), (unmark, None)):
        if version is not None:
            _set_mark(state, version, text)
    manifests = _manifests(redis_url, state, count)
    marks, out = checkpoints(state / "checkpoints"), gone(manifests)
    for manifest in manifests:
        version = manifest["version"]
        if as_json:
            extra = {"checkpoint": version in marks, "mark": marks.get(version, ""), "rolled_back": version in out}
            click.echo(json.dumps(manifest | extra, default=str))
        else:
            click.echo(line(manifest, marks) + ("  (rolled back)" if version in out else ""))


def _manifests(redis_url: str | None, state: Path, count: int) -> list[dict[str, Any]]:
    problem = "Redis has no versions"
    try:
        connection = connect(resolve_url(redis_url), redis.Redis.from_url)
        if found := versions_from_redis(connection, count):
            if len(found) < min(count, found[0]["version"]):
                click.echo("of the other versions Redis has no manifest (the worker's --history)", err=True)
            return found
    except (redis.RedisError, TandemError) as error:
        problem = str(error)
    found = versions_from_journal(state / "journal", count)
    click.echo(f"{problem}: this is the journal in {state}", err=True)
    return found


def _set_mark(state: Path, version: int, name: str | None) -> None:
    folder = state / "checkpoints" / str(version) / "tandem"
    if not folder.is_dir():
        have = ", ".join(map(str, sorted(checkpoints(state / "checkpoints")))) or "none"
        raise TandemError(f"version {version} has no checkpoint in {state}; there are: {have}")
    if name is None:
        (folder / "mark").unlink(missing_ok=True)
    else:
        replace(folder / "mark", f"{name}\n".encode())
