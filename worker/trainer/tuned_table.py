"""Tables of what Triton's autotuner chose for a kernel, by card: a file that ships with the package.

    tables = read(SHIPPED)
    table = table_for(tables, card, triton.__version__)   # None: nobody recorded one for these
    table.winner(kernel, source, key)                     # {"BD": 64, "num_warps": 4, ...}, or None
    write(SHIPPED, [*tables, recorded])                   # benchmarks/tuned_kernels.py records

The file: {"format": 1, "tables": [{"card", "capability", "multiprocessors", "triton", "kernels": [{"kernel", "source",
"winners": [[key, options], ...]}]}]}. source: Triton's own digest of a kernel's source and of what it calls. key: what
the autotuner keeps a winner by: some arguments' values, and tensors' types.

Must not know: the server.
Invariants: a winner is given for the very source and key that it was recorded with; a file that is not such a document
is a TableError that names what is wrong, never a shorter table.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("tuned_kernels.json")
FORMAT = 1
Scalar = int | float | str | bool | None
Key = tuple[Scalar, ...]
Options = dict[str, Scalar]


class TableError(Exception):
    """A file of tables that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Card:
    """A GPU, as far as kernels are tuned for it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    def like(self, other: "Card") -> bool:
        """Whether what is fastest on one is taken to be fastest on the other: an H100 SXM and an H200, but no H100
        PCIe, which has fewer multiprocessors."""
        return (self.capability, self.multiprocessors) == (other.capability, other.multiprocessors)


@dataclass(frozen=True)
class Kernel:
    """What was chosen for a kernel of this source."""

    source: str
    winners: dict[Key, Options] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What one version of Triton chose on one card, by the kernel's name."""

    card: Card
    triton: str
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def winner(self, kernel: str, source: str, key: Key) -> Options | None:
        """The options of the candidate that won; None where nobody recorded it, or of another source."""
        found = self.kernels.get(kernel)
        return found.winners.get(key) if found is not None and found.source == source else None

    def knows_otherwise(self, kernel: str, source: str) -> bool:
        """Whether winners of `kernel` were recorded with another source than this one."""
        return kernel in self.kernels and self.kernels[kernel].source != source

    def add(self, kernel: str, source: str, key: Key, options: Options) -> None:
        """Keep one winner; those of the kernel's former source are dropped."""
        if kernel not in self.kernels or self.kernels[kernel].source != source:
            self.kernels[kernel] = Kernel(source)
        self.kernels[kernel].winners[key] = options


def table_for(tables: Iterable[Table], card: Card, triton: str) -> Table | None:
    """The table of `card` and this version of Triton: its own, or else one of a card like it."""
    usable = [table for table in tables if table.triton == triton and table.card.like(card)]
    return next((table for table in usable if table.card.name == card.name), usable[0] if usable else None)


def read(path: Path) -> list[Table]:
    """The tables of a file. Raises TableError."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: the table of tuned kernels cannot be read: {error}") from error
    try:
        if document["format"] != FORMAT:
            raise TableError(f"{path}: a table of tuned kernels of format {document['format']!r}, this reads {FORMAT}")
        return [_table(entry) for entry in document["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise TableError(f"{path}: this is no table of tuned kernels ({why}); install the package again") from error


def _table(entry: dict[str, Any]) -> Table:
    major, minor = entry["capability"]
    card = Card(_as(str, entry["card"]), (_as(int, major), _as(int, minor)), _as(int, entry["multiprocessors"]))
    table = Table(card, _as(str, entry["triton"]))
    for kernel in entry["kernels"]:
        for key, options in kernel["winners"]:
            keys, values = [_scalar(part) for part in _as(list, key)], _as(dict, options)
            named = {name: _scalar(value) for name, value in values.items()}
            table.add(_as(str, kernel["kernel"]), _as(str, kernel["source"]), tuple(keys), named)
    return table


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    return value


def _scalar(value: Any) -> Scalar:
    if not is_scalar(value):
        raise TypeError(f"{value!r:.60} is no number, text or null")
    return value  # type: ignore[no-any-return]


def is_scalar(value: object) -> bool:
    """Whether a part of a key, or an option, can stand in a table."""
    return value is None or isinstance(value, (int, float, str))


def write(path: Path, tables: Iterable[Table]) -> None:
    """Write `tables`, one winner a line. Of two of the same card and Triton, the later one's winners stand."""
    whole: dict[tuple[str, str], Table] = {}
    for table in tables:
        kept = whole.setdefault((table.card.name, table.triton), Table(table.card, table.triton))
        for name, kernel in table.kernels.items():
            for key, options in kernel.winners.items():
                kept.add(name, kernel.source, key, options)
    new = path.with_name(path.name + ".new")
    new.write_text(f'{{"format": {FORMAT}, "tables": [{",".join(_shown(table) for table in whole.values())}\n]}}\n')
    new.replace(path)


def _shown(table: Table) -> str:
    card = table.card
    head = {"card": card.name, "capability": card.capability, "multiprocessors": card.multiprocessors}
    return (
        f'\n{json.dumps(head | {"triton": table.triton})[:-1]}, "kernels": ['
        + ",".join(_shown_kernel(name, kernel) for name, kernel in sorted(table.kernels.items()))
        + "\n]}"
    )


def _shown_kernel(name: str, kernel: Kernel) -> str:
    winners = sorted(json.dumps([key, options]) for key, options in kernel.winners.items())
    head = json.dumps({"kernel": name, "source": kernel.source})[:-1]
    return f'\n {head}, "winners": [' + ",".join(f"\n  {winner}" for winner in winners) + "\n ]}"
