"""What the demo prints: to the terminal, and to a second console that can be saved as a picture.

Invariant: progress is shown and never kept; what `say` prints is both.
"""

import contextlib
import io
import re
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

WIDTH = 110
"""Columns of the picture; the tables fit into them."""

console = Console(highlight=False)
_picture = Console(highlight=False, record=True, width=WIDTH, file=io.StringIO())


def say(text: str = "", end: str = "\n") -> None:
    """Print rich markup."""
    console.print(text, end=end, soft_wrap=True)
    _picture.print(text, end=end)


def status(text: str) -> contextlib.AbstractContextManager[Status]:
    """A spinner with `text` while something takes long."""
    return console.status(text)


def save_picture(path: Path, title: str) -> None:
    """Write what was said so far as an SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = _picture.export_svg(title=title, clear=False)
    path.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))  # fonts of the reader's own machine


def show_answer(question: str, answer: str, version: str) -> None:
    """An answer, and the version of the weights that the response's header names."""
    text = escape(short(answer, 100))
    say(f"  [dim]asked[/]     {question}\n  [dim]answered[/]  [bold]{text}[/]  [dim](weights version {version})[/]\n")


def short(text: str, columns: int) -> str:
    """`text` on one line of at most so many columns."""
    line = " ".join(text.split())
    return line if len(line) <= columns else line[: columns - 3].rstrip() + "..."
