"""`tandem enqueue` and `tandem version`.

Reads JSONL as it arrives, so that a pipe that goes on for days works like a file; holds one block and one line of it.
Invariants: a bad line is reported by its number and stops nothing; only the summary goes to stdout.
"""

import contextlib
import logging
import os
import stat
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from io import BufferedReader
from typing import Any

import click

from .client import Producer
from .connection import DEFAULT_URL
from .errors import QueueUnavailableError
from .eviction import log as eviction_log
from .jsonl import Line, checked_blocks, parse_line
from .transcript import Transcript

redis_option = click.option("--redis", "redis_url", metavar="URL", help=f"Default: $REDIS_URL, else {DEFAULT_URL}.")


KEPT = 100_000
"""Of how many queued lines, the latest, it is looked up at the end whether Redis still has them."""


@click.command()
@click.argument("file", type=click.File("rb"))
@redis_option
def enqueue(file: BufferedReader, redis_url: str | None) -> None:
    """Queue the transcripts in FILE, one JSON object a line; - is standard input.

    Lines that cannot be queued are reported and skipped; the exit code is then 1. A file of another format (ratings,
    pairs, an export) is refused as a whole. A line whose id is known is not
    queued again. So if all lines have ids, you can send the file twice.

    If Redis may evict keys, the command checks at the end that Redis still has everything that was queued.
    """
    counts = {"queued": 0, "already known": 0, "rejected": 0}
    queued: deque[tuple[int, str]] = deque(maxlen=KEPT)
    eviction_log.setLevel(logging.ERROR)  # said below, in this command's own way
    with Producer(redis_url) as producer:
        safe = _say_eviction(producer)
        with _progress(file) as bar:
            for lines, size in checked_blocks(file, file.name):
                queued += _send(producer, file.name, lines, counts, bar)
                bar.update(size)
        lost = 0 if safe else _report_lost(producer, file.name, queued)
    summary = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    click.echo(summary + (f", lost {lost:,}" if lost else ""))
    if counts["rejected"] or lost:
        sys.exit(1)


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


def _send(producer: Producer, name: str, lines: list[Line], counts: dict[str, int], bar: Any) -> list[tuple[int, str]]:
    """Queue what is valid, report the rest; returns line and id of those that were queued."""
    good: list[tuple[int, Transcript]] = []
    for number, line in lines:
        try:
            transcript = parse_line(line, first=number == 1)
        except ValueError as error:  # InvalidTranscriptError is one
            counts["rejected"] += 1
            click.echo(f"{bar.clear}error: {name}:{number}: {error}", err=True)
        else:
            if transcript is not None:
                good.append((number, transcript))
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


class _NoBar:
    clear = ""

    def update(self, size: int) -> None:
        pass


@contextlib.contextmanager
def _progress(file: BufferedReader) -> Iterator[Any]:
    """A bar on stderr if that is a terminal and the input's size is known."""
    try:
        info = os.fstat(file.fileno())
    except OSError:  # not a file of the system's
        info = None
    if info is None or not stat.S_ISREG(info.st_mode) or not sys.stderr.isatty():
        yield _NoBar()
        return
    with click.progressbar(length=info.st_size, label="enqueue", file=sys.stderr) as bar:
        bar.clear = "\r\033[K"  # type: ignore[attr-defined] # makes room for a message; the next update redraws
        yield bar
