"""`tandem enqueue` and `tandem version`.

Reads records as they arrive, so that a pipe that goes on for days works like a file; holds one block and one record of
it. Invariants: a bad record is reported by its line and stops nothing; only the summary goes to stdout; a dry run asks
no Redis.
"""

import logging
import os
import stat
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from typing import Any, TypeVar

import click

from .client import Producer
from .connection import DEFAULT_URL
from .errors import QueueUnavailableError
from .eviction import log as eviction_log
from .formats import READ
from .formats.record import Pairs
from .imports import AUTO, Import, Item
from .progress import BYTES, Progress, progress
from .transcript import Transcript

redis_option = click.option("--redis", "redis_url", metavar="URL", help=f"Default: $REDIS_URL, else {DEFAULT_URL}.")
F = TypeVar("F", bound=Callable[..., Any])


def format_option(**more: Any) -> Callable[[F], F]:
    """Click decorator: --format as `format_name`, for every command that reads a file of conversations."""
    formats = click.Choice([AUTO, *(item.name for item in READ)])
    return click.option("--format", "format_name", metavar="NAME", type=formats, default=AUTO, **more)


KEPT = 100_000
"""Of how many queued lines, the latest, it is looked up at the end whether Redis still has them."""


def _help() -> str:
    """The formats, as `--help` lists them."""
    rows = [(AUTO, "found from the first records"), *((item.name, item.title) for item in READ)]
    return "\b\nFormats (docs/formats.md):\n" + "\n".join(f"  {name:<18} {title}" for name, title in rows)


@click.command(epilog=_help())
@click.argument("file", type=click.File("rb"))
@redis_option
@format_option(show_default=True, help="The file's format, one of those below.")
@click.option(
    "--dislikes",
    type=click.Choice(["learn", "leave-out"]),
    default="learn",
    show_default=True,
    help="Disliked answers: the model learns to give them less often, or they are left out.",
)
@click.option(
    "--pairs",
    type=click.Choice(["learn", "chosen", "leave-out"]),
    default="learn",
    show_default=True,
    help="Preference pairs: learn to prefer the chosen answer, queue it as a demonstration, or leave the pair out.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be queued. Nothing is queued, and Redis is not asked.")
def enqueue(
    file: BufferedReader, redis_url: str | None, format_name: str, dislikes: str, pairs: Pairs, dry_run: bool
) -> None:
    """Queue the conversations in FILE; - is standard input.

    FILE has one JSON object a line, or is a JSON array of them. Records that cannot be queued are reported and skipped;
    the exit code is then 1. A file of no known format is refused as a whole.

    What users said travels along: an answer that was disliked is learnt as one to give less often. What says neither
    good nor bad (a comment without a rating, users who disagree) is left out and counted.

    A record whose id is known is not queued again. One without an id gets an id from its content. So you can send a
    file twice.

    If Redis may evict keys, the command checks at the end that Redis still has everything that was queued.
    """
    source = Import(file, file.name, format_name, dislikes=dislikes == "learn", pairs=pairs)
    lost, kinds = 0, Counter[str]()
    if dry_run:
        counts, kinds = _dry_run(source, file)
    else:
        counts, lost = _enqueue(source, file, redis_url)
    summary = _listed(counts) + (f", lost {lost:,}" if lost else "")
    click.echo(f"{source.format.name}: {summary}" if dry_run and source.format is not None else summary)
    if kinds:
        click.echo(f"kinds: {_listed(kinds)}")
    for reason, count in source.left_out.items():
        click.echo(reason.sentence(count))
    if source.strays:
        others = f"{source.strays.total():,} more of other formats ({_listed(source.strays)})"
        click.echo(f"rejected and not reported one by one: {others}")
    if counts["rejected"] or lost:
        sys.exit(1)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _enqueue(source: Import, file: BufferedReader, redis_url: str | None) -> tuple[dict[str, int], int]:
    """Queue what `source` holds. Returns the counts, and how many were lost again."""
    counts = {"queued": 0, "already known": 0, "rejected": 0}
    queued: deque[tuple[int, str]] = deque(maxlen=KEPT)
    eviction_log.setLevel(logging.ERROR)  # said below, in this command's own way
    with Producer(redis_url) as producer:
        safe = _say_eviction(producer)
        with progress("enqueue", _size(file), BYTES) as shown:
            for items in _read(source, shown, counts):
                queued += _send(producer, source.name, items, counts)
        return counts, 0 if safe else _report_lost(producer, source.name, queued)


def _dry_run(source: Import, file: BufferedReader) -> tuple[dict[str, int], Counter[str]]:
    """What `_enqueue` would do, without a queue; ids are not compared. Returns the counts, and those of the kinds."""
    counts = {"would queue": 0, "rejected": 0}
    kinds: Counter[str] = Counter()
    with progress("enqueue", _size(file), BYTES) as shown:
        for items in _read(source, shown, counts):
            kinds.update(transcript.kind for _, transcript in items)
    counts["would queue"] = kinds.total()
    return counts, kinds


def _read(source: Import, shown: Progress, counts: dict[str, int]) -> Iterator[list[tuple[int, Transcript]]]:
    """The transcripts of each block with their lines. Reports bad records, and says once which format was found."""
    said = source.format is not None
    for items, size in source.blocks():
        if source.format is not None and not said:
            said = True
            if source.format.name != "messages":
                shown.say(f"note: {source.name} holds {source.format.title}")
        yield [item for item in items if _good(item, source, shown, counts)]  # type: ignore[misc]
        shown.advance(size)
    counts["rejected"] += source.strays.total()


def _good(item: Item, source: Import, shown: Progress, counts: dict[str, int]) -> bool:
    """Whether it is a transcript; reports and counts what is none."""
    number, read = item
    if isinstance(read, Transcript):
        return True
    counts["rejected"] += 1
    shown.say(f"error: {source.name}:{number}: {read}")
    return False


@click.command()
@redis_option
def version(redis_url: str | None) -> None:
    """Print the version of the weights that is live (0: none published yet)."""
    with Producer(redis_url) as producer:
        click.echo(producer.version())


def _say_eviction(producer: Producer) -> bool:
    """Whether nothing that is queued can be evicted; says so on stderr where it can, or where that is unknown."""
    eviction = producer.eviction()
    if eviction.problem:
        click.echo(f"warning: {eviction.problem}", err=True)
    if not eviction.known:
        click.echo("note: eviction policy of Redis unknown: no worker has published it yet", err=True)
    return eviction.known and not eviction.loses_jobs


def _send(
    producer: Producer, name: str, good: list[tuple[int, Transcript]], counts: dict[str, int]
) -> list[tuple[int, str]]:
    """Queue transcripts; returns line and id of those that were queued."""
    try:
        outcomes = producer.enqueue_many(transcript for _, transcript in good)
    except QueueUnavailableError as error:
        first = good[len(error.queued)][0]
        raise QueueUnavailableError(f"{error}. Everything before line {first} of {name} was dealt with") from error
    for outcome in outcomes:
        counts["queued" if outcome.new else "already known"] += 1
    return [(number, sent.id) for (number, _), sent in zip(good, outcomes, strict=True) if sent.new]


def _report_lost(producer: Producer, name: str, queued: Iterable[tuple[int, str]]) -> int:
    """Report, by line and id, what was queued and is neither queued nor trained any more; returns how many."""
    lines = {job_id: number for number, job_id in queued}
    missing = producer.missing(lines)
    for job_id in missing:
        click.echo(f"error: {name}:{lines[job_id]}: {job_id} was queued, and Redis has evicted it", err=True)
    return len(missing)


def _size(file: BufferedReader) -> int | None:
    """Bytes of the input; None for what is no file."""
    try:
        info = os.fstat(file.fileno())
    except OSError:  # not a file of the system's
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None
