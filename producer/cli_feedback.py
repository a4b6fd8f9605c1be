"""`tandem feedback KEY`: a rating, a correction or a comment on a recorded answer, from the command line.

Must not know: the worker.
Invariants: everything that was typed is checked before anything is queued; one line on stdout for each thing said.
"""

import sys
from pathlib import Path

import click

from .cli import redis_option
from .client import Producer
from .errors import InvalidTranscriptError, TandemError
from .opinions import Opinion
from .transcript import MAX_BYTES

WORDS = {"up": 1.0, "true": 1.0, "down": -1.0, "false": -1.0, "none": 0.0}
"""What may be said in place of a number."""


@click.command()
@click.argument("key")
@click.option("--rating", metavar="NUMBER", help="From -1 to 1; up, down. 0 takes a rating back.")
@click.option("--correction", metavar="TEXT", help="The answer that it should have been.")
@click.option("--comment", metavar="TEXT", help='What should have been otherwise, such as "be shorter".')
@click.option("--user", help="Who says so. Without it: who asked, if that is recorded.")
@redis_option
def command(
    key: str,
    rating: str | None,
    correction: str | None,
    comment: str | None,
    user: str | None,
    redis_url: str | None,
) -> None:
    """Queue what is said of a recorded answer.

    KEY names the record; the server sent it with the answer. TEXT may be @FILE, or @- for standard input; begin a text
    that starts with @ with @@.

    What the same user said before is replaced while it is queued. Ratings of several users are queued as one; where
    they cancel out, nothing is. The exit code is 1 if anything was refused, and if KEY names no record.
    """
    said: dict[str, Opinion] = {}
    if rating is not None:
        said["rating"] = Opinion.rating(_number(rating), user)
    if correction is not None:
        said["correction"] = Opinion.correction(_text(correction, "--correction"), user)
    if comment is not None:
        said["comment"] = Opinion.comment(_text(comment, "--comment"), user)
    if not said:
        raise click.UsageError("say something: --rating, --correction or --comment")
    refused = False
    with Producer(redis_url) as producer:
        for name, opinion in said.items():
            try:
                sent = producer.say(key, opinion)
            except InvalidTranscriptError as error:
                refused = True
                click.echo(f"error: {error}", err=True)
            else:
                click.echo(f"{name}: {sent.outcome} {sent.id}")
    if refused:
        sys.exit(1)


def _number(text: str) -> float:
    """The number that a rating says. Raises InvalidTranscriptError."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return float(text)
    except ValueError:
        raise InvalidTranscriptError("--rating", "must be a number from -1 to 1, up or down") from None


def _text(given: str, flag: str) -> str:
    """What TEXT stands for. Raises TandemError."""
    if not given.startswith("@") or given.startswith("@@"):
        return given.removeprefix("@")
    name = given.removeprefix("@")
    try:
        with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise TandemError(f"{flag}: {name} has more than {MAX_BYTES:,} bytes")
        return raw.decode()
    except OSError as error:
        raise TandemError(f"{flag}: cannot read {name} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise TandemError(f"{flag}: {name} is not text in UTF-8") from None
