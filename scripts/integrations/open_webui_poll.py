"""Queue the feedback of Open WebUI's own thumbs: reads its evaluation API and hands new entries to the producer.

    export OPEN_WEBUI_TOKEN=...      # an administrator's API key
    python open_webui_poll.py http://127.0.0.1:3000 --state feedback.time --every 300

Must not know: the worker, Open WebUI's packages.
Invariants: an entry's id in Open WebUI is the transcript's, so that nothing is queued twice, whatever becomes of the
file of --state; the time in it moves on only after everything before it was queued or reported; the token and the texts
are in no message, and the token goes nowhere but to the URL that was given.
"""

import http.client
import json
import os
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from producer import InvalidTranscriptError, Outcome, Producer, TandemError, Transcript
from producer.formats import LeaveOut, Reason
from producer.formats.openwebui import read
from producer.formats.record import record_id
from producer.json_values import values
from producer.jsonl import BLOCK, MAX_LINE, parse_line

PATH = "/api/v1/evaluations/feedbacks/all/export"
"""Of Open WebUI 0.12.4: all entries as a JSON array, for administrators."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token along to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch(url: str, token: str, file: BinaryIO, timeout: float) -> None:
    """Write the whole export to `file`. Raises TandemError."""
    try:
        request = urllib.request.Request(url.rstrip("/") + PATH, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
            if "json" not in answer.headers.get("Content-Type", ""):
                raise TandemError(f"{PATH}: the server answers with no JSON: is this Open WebUI's URL?")
            shutil.copyfileobj(answer, file)
            if answer.length:  # of what was promised, this is missing
                raise TandemError("Open WebUI's answer broke off: try again")
    except urllib.error.HTTPError as error:
        hints = {
            401: "give an administrator's API key in $OPEN_WEBUI_TOKEN, and allow API keys in Open WebUI's settings"
        }
        hints |= {403: hints[401], 404: "this Open WebUI has no such path, or this is not its URL"}
        raise TandemError(f"{PATH}: Open WebUI answers {error.code}: {hints.get(error.code, 'try again')}") from None
    except OSError as error:
        reason = type(getattr(error, "reason", error)).__name__
        raise TandemError(f"Open WebUI cannot be reached ({reason}): is the URL right, and is it running?") from None
    except http.client.IncompleteRead:
        raise TandemError("Open WebUI's answer broke off: try again") from None
    except (ValueError, http.client.HTTPException):
        raise TandemError("URL or $OPEN_WEBUI_TOKEN has characters that no request can have") from None


def entries(file: BinaryIO) -> Iterator[Any]:
    """The entries of an export, one at a time, or the ValueError that says what is wrong with one."""
    for found, _size in values(lambda: file.read(BLOCK), MAX_LINE):
        for number, raw in found:
            try:
                yield parse_line(raw, first=number == 1)
            except ValueError as error:
                yield error


def transcript(entry: Any, *, dislikes: bool = True) -> Transcript:
    """What is queued of an entry.

    Raises InvalidTranscriptError, and LeaveOut for what says nothing that could be learnt."""
    if not isinstance(entry, dict):
        raise InvalidTranscriptError("feedback", "must be an object")
    record = read(entry)
    fields = record.transcript(dislikes=dislikes)
    return Transcript.from_dict(fields | {"id": record_id(record.id, fields, unique=True, said_by=record.users)})


class Since:
    """Up to when entries were dealt with: Open WebUI's `updated_at`, in seconds, and the ids of that very second.

    path: a file of its own; None: known as long as this process lives.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises TandemError."""
        self.path = path
        self.time, self.ids = 0, set[str]()
        if path is None or not path.exists():
            return
        try:
            known = json.loads(path.read_text())
            self.time, self.ids = int(known["time"]), {str(one) for one in known["ids"]}
        except OSError as error:
            raise TandemError(f"--state: cannot read {path} ({error.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise TandemError(f"--state: {path} is no file of this command's: delete it, or name another one") from None

    def knows(self, entry: Any) -> bool:
        when = _when(entry)
        return when is not None and (when < self.time or (when == self.time and str(entry.get("id")) in self.ids))

    def move(self, seen: list[tuple[int, str]]) -> None:
        """These were dealt with too: (updated_at, id). Raises TandemError."""
        last = max((when for when, _ in seen), default=self.time)
        if last < self.time or not seen:
            return
        ids = {name for when, name in seen if when == last}
        self.time, self.ids = last, ids | (self.ids if last == self.time else set())
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".new")
        try:
            beside.write_text(json.dumps({"time": self.time, "ids": sorted(self.ids)}))
            beside.replace(self.path)
        except OSError as error:
            raise TandemError(f"--state: cannot write {self.path} ({error.strerror})") from None


def _when(entry: Any) -> int | None:
    when = entry.get("updated_at") if isinstance(entry, dict) else None
    return when if isinstance(when, int) and not isinstance(when, bool) else None


def poll(
    url: str, token: str, producer: Producer, since: Since, *, dislikes: bool = True, timeout: float = 60.0
) -> Counter[str]:
    """Queue what is new. Returns counts: queued, already known, rejected; and of `Reason.name`, what was left out.

    Reports on stderr what is rejected. Raises TandemError, and then does not move `since`; nor does it where a part of
    the export is no JSON."""
    counts: Counter[str] = Counter({"queued": 0, "already known": 0, "rejected": 0})
    seen: list[tuple[int, str]] = []
    whole = True
    with tempfile.TemporaryFile() as file:
        fetch(url, token, file, timeout)
        file.seek(0)
        new: list[Transcript] = []
        for entry in entries(file):
            if since.knows(entry):
                continue
            when = _when(entry)
            if when is not None:
                seen.append((when, str(entry.get("id"))))
            try:
                if isinstance(entry, ValueError):
                    whole = False
                    raise entry
                new.append(transcript(entry, dislikes=dislikes))
            except LeaveOut as left:
                counts[left.reason.name] += 1
            except ValueError as error:  # InvalidTranscriptError is one, and quotes no text
                counts["rejected"] += 1
                name = entry.get("id") if isinstance(entry, dict) else "an entry"
                click.echo(f"error: feedback {name}: {error}", err=True)
            if len(new) == 100:
                _queue(producer, new, counts)
        _queue(producer, new, counts)
    if whole:
        since.move(seen)
    return counts


def _queue(producer: Producer, new: list[Transcript], counts: Counter[str]) -> None:
    for sent in producer.enqueue_many(new):
        counts["queued" if sent.outcome is Outcome.QUEUED else "already known"] += 1
    new.clear()


@click.command()
@click.argument("url")
@click.option("--redis", "redis_url", metavar="URL", help="Default: $REDIS_URL, else redis://127.0.0.1:6379/0.")
@click.option("--state", type=click.Path(dir_okay=False, path_type=Path), help="Keeps up to when feedback was read.")
@click.option("--every", type=click.FloatRange(1), metavar="SECONDS", help="Goes on for ever. Without it: once.")
@click.option("--dislikes", type=click.Choice(["learn", "leave-out"]), default="learn", show_default=True)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Of Open WebUI, in seconds."
)
def command(
    url: str, redis_url: str | None, state: Path | None, every: float | None, dislikes: str, timeout: float
) -> None:
    """Queue the feedback of the Open WebUI at URL. $OPEN_WEBUI_TOKEN holds an administrator's API key.

    What is known is not queued again, so you can run this as often as you like. With --every, what goes wrong is said,
    and tried again. Without it the exit code is 1 where anything was rejected or went wrong.
    """
    token = os.environ.get("OPEN_WEBUI_TOKEN", "").strip()
    if not token:
        raise click.UsageError("$OPEN_WEBUI_TOKEN is missing: an administrator's API key (Settings, Account)")
    if not url.startswith(("http://", "https://")):
        raise click.UsageError("URL must begin with http:// or https://")
    try:
        since = Since(state)
        with Producer(redis_url) as producer:
            while True:
                ended = _pass(url, token, producer, since, dislikes == "learn", timeout)
                if every is None:
                    sys.exit(0 if ended else 1)
                time.sleep(every)
    except TandemError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _pass(url: str, token: str, producer: Producer, since: Since, dislikes: bool, timeout: float) -> bool:
    """One poll, and its line on stdout. Whether all went well."""
    try:
        counts = poll(url, token, producer, since, dislikes=dislikes, timeout=timeout)
    except TandemError as error:
        click.echo(f"error: {error}", err=True)
        return False
    names = ("queued", "already known", "rejected")
    click.echo(", ".join(f"{name} {counts[name]:,}" for name in names))
    for reason in Reason:
        if counts[reason.name]:
            click.echo(reason.sentence(counts[reason.name]))
    return not counts["rejected"]


if __name__ == "__main__":
    command()
