"""How far long work is: a bar on a terminal, a line every few seconds elsewhere, and nothing about what is short.

    with progress("enqueue", size, BYTES) as shown:
        shown.advance(len(block))
        shown.say("error: ...")     # a line of its own, above the bar

All of it goes to stderr, or into the log of a program that keeps one: stdout is left to results. rich draws the bar
where it is installed. TANDEM_PROGRESS=off shows nothing.
Must not know: Redis, RQ, the worker.
Invariants: work of less than `QUIET` seconds shows nothing; a thread shows, so that work which does not come back for a
while is still seen to go on; it ends with the block, whatever is raised there.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from typing import Any, Protocol, Self

log = logging.getLogger("tandem.progress")

QUIET = 2.0
"""Seconds in which nothing is shown."""
EVERY = 5.0
"""Seconds from one line to the next."""
REDRAW = 0.2
"""Seconds from one picture of the bar to the next."""
OFF = "TANDEM_PROGRESS"
"""Environment: "off" shows nothing."""
WIDTH = 24
"""Characters of a bar that we draw ourselves."""
BYTES = "B"
"""The unit of sizes."""


class Progress:
    """Of one piece of work. `advance` and `say` may be called from one thread, the one that works."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()  # around what is on the screen
        self._shown: _Shown | None = None
        self._thread = threading.Thread(target=self._run, name=f"progress {label}", daemon=True)

    def advance(self, by: float = 1, note: str | None = None) -> None:
        """So much more of it is done. note: what is done now."""
        self.done += by
        self.note = self.note if note is None else note

    def at(self, done: float, total: float | None, note: str = "") -> None:
        """So much is done in all, out of `total`."""
        self.done, self.total, self.note = done, total, note

    def say(self, text: str) -> None:
        """Print `text` to stderr, on a line of its own."""
        with self._lock:
            if self._shown is not None:
                self._shown.clear()
            print(text, file=sys.stderr, flush=True)

    def line(self) -> str:
        """How far it is now, in words."""
        return describe(self.label, self.done, self.total, self.unit, self.note, time.monotonic() - self.started)

    def _run(self) -> None:
        if self._over.wait(QUIET) or os.environ.get(OFF) == "off":
            return
        shown = _bar(self) if _on_terminal() else _Lines(self)
        with self._lock:
            self._shown = shown
        while True:
            with self._lock:
                shown.draw()
            if self._over.wait(shown.pace):
                break
        with self._lock:
            shown.clear()
            shown.close()
            self._shown = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def progress(label: str, total: float | None = None, unit: str = "") -> Progress:
    """A context manager. total: None if nobody knows; unit: BYTES, or what is counted, in the plural."""
    return Progress(label, total, unit)


def describe(label: str, done: float, total: float | None, unit: str, note: str, seconds: float) -> str:
    """enqueue: 45 %, 12.3 of 27.4 MB, about 8 s left"""
    parts = []
    if total:
        done = min(done, total)
        parts.append(f"{100 * done / total:.0f} %")
    if total is None or total:
        parts.append(_amount(done, total, unit))
    if note:
        parts.append(note)
    if total and 0 < done < total:
        parts.append(f"about {_time(seconds * (total - done) / done)} left")
    else:
        parts.append(f"{_time(seconds)} so far")
    return f"{label}: {', '.join(part for part in parts if part)}"


def _amount(done: float, total: float | None, unit: str) -> str:
    if unit == BYTES:
        of = f" of {total / 1e6:,.1f}" if total else ""
        return f"{done / 1e6:,.1f}{of} MB"
    if not total and not done:
        return ""
    of = f" of {total:,.0f}" if total else ""
    return f"{done:,.0f}{of} {unit}".rstrip()


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Shown(Protocol):
    pace: float

    def draw(self) -> None:
        """Show how far it is now."""

    def clear(self) -> None:
        """Make room for a line."""

    def close(self) -> None:
        """Nothing more is shown."""


class _Lines:
    """For a log."""

    def __init__(self, of: Progress) -> None:
        self.of, self.pace = of, EVERY

    def draw(self) -> None:
        if log.hasHandlers() and log.isEnabledFor(logging.INFO):
            log.info("%s", self.of.line())
        else:
            print(self.of.line(), file=sys.stderr, flush=True)

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Plain(_Lines):
    """For a terminal, where rich is not installed."""

    def __init__(self, of: Progress) -> None:
        self.of, self.pace = of, REDRAW

    def draw(self) -> None:
        full = round(WIDTH * min(1.0, self.of.done / self.of.total)) if self.of.total else 0
        drawn = f"[{'#' * full}{'-' * (WIDTH - full)}] " if self.of.total else ""
        columns = 80
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        print(f"\r\033[K{(drawn + self.of.line())[: columns - 1]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Rich:
    """For a terminal."""

    def __init__(self, of: Progress) -> None:
        from rich.console import Console
        from rich.live import Live

        self.of, self.pace = of, REDRAW
        console = Console(stderr=True)
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def draw(self) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(self.of.total or None, min(self.of.done, self.of.total or 0), WIDTH, pulse=not self.of.total)
        row.add_row(bar, Text(self.of.line()))
        self._live.update(row, refresh=True)

    def clear(self) -> None:
        self._live.update("", refresh=True)

    def close(self) -> None:
        self._live.stop()


def _bar(of: Progress) -> Any:
    try:
        return _Rich(of)
    except ImportError:
        return _Plain(of)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
