"""`tandem enqueue` and `tandem version`.

Reads JSONL as it arrives, so that a pipe that goes on for days works like a file; holds one block and one line of it.
Must not know: how lines are read and transcripts queued (jsonl.py, client.py).
Invariants: a bad line is reported by its number and stops nothing; only the summary goes to stdout.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

import click

from producer.client import Producer
from producer.jobs import DEFAULT_URL, Enqueued, QueueUnavailable
from producer.jsonl import Line, blocks, parse_line
from producer.transcript import Transcript

redis_option = click.option("--redis", "redis_url", metavar="URL", help=f"Default: $REDIS_URL, else {DEFAULT_URL}.")


@click.command()
@click.argument("file", type=click.File("rb"))
@redis_option
def enqueue(file: BufferedReader, redis_url: str | None) -> None:
    """Queue the transcripts in FILE, one JSON object a line; - is standard input.

    Lines that cannot be queued are reported and skipped; the exit code is then 1. Lines whose id is known are not
    queued again, so a file whose lines have ids may be sent twice.
    """
    counts = {"queued": 0, "already known": 0, "rejected": 0}
    with Producer(redis_url) as producer, _progress(file) as bar:
        for lines, size in blocks(file):
            _send(producer, file.name, lines, counts, bar)
            bar.update(size)
    click.echo(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if counts["rejected"]:
        sys.exit(1)


@click.command()
@redis_option
def version(redis_url: str | None) -> None:
    """Print the version of the weights that is live (0: none published yet)."""
    with Producer(redis_url) as producer:
        click.echo(producer.version())


def _send(producer: Producer, name: str, lines: list[Line], counts: dict[str, int], bar: Any) -> None:
    good: list[tuple[int, Transcript]] = []
    for number, line in lines:
        try:
            transcript = parse_line(line, first=number == 1)
        except ValueError as error:  # InvalidTranscript is one
            counts["rejected"] += 1
            click.echo(f"{bar.clear}error: {name}:{number}: {error}", err=True)
        else:
            if transcript is not None:
                good.append((number, transcript))
    try:
        outcomes = producer.enqueue_many(transcript for _, transcript in good)
    except QueueUnavailable as error:
        first = good[len(error.queued)][0]
        raise QueueUnavailable(f"{error}. Everything before line {first} of {name} was dealt with") from error
    for outcome in outcomes:
        assert isinstance(outcome, Enqueued), "validated above"
        counts["queued" if outcome.new else "already known"] += 1


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
