"""The table and the plot of training.py's results. Must not know: how they were measured.

python benchmarks/training_report.py results/training_27B.json results/training_0.8B.json training.png
"""

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import outputs
from record import Record
from rich.console import Console
from rich.table import Table


def show(record: Record) -> None:
    table = Table(title="Training alone: medians")
    for column in ("size, sequences", "who", "tokens/s", "MFU", "with recompute", "step s", "halves s", "peak GB"):
        table.add_column(column, justify="left" if column in ("size, sequences", "who") else "right")
    for name, part in record.parts.items():
        for who, row in part.items():
            if not isinstance(row, dict):
                continue
            if "no figure" in row:
                table.add_row(name, who, row["no figure"].split(":")[0])
            elif "tokens_per_s" in row:
                first, second = list(row)[:2]
                halves = f"{row[first]:.3f} + {row[second]:.3f}"
                shares = (f"{row['mfu']:.1%}", f"{row['with_recompute']:.1%}")
                cells = (f"{row['tokens_per_s']:,.0f}", *shares, f"{row['step_s']:.3f}", halves)
                table.add_row(name, who, *cells, f"{row['peak_bytes'] / 1e9:.2f}")
    Console(width=140).print(table)


def plot(parts: Iterable[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """Tokens/s over the token budget, a panel a size, packed sequences only. parts: as `Record.parts` has them."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, part in parts:
        if part.get("mix") != "packed":
            continue
        panel = lines.setdefault(name.split(",")[0], {})
        for who, row in part.items():
            if isinstance(row, dict) and "tokens_per_s" in row:
                panel.setdefault(who, []).append((part["tokens"], row["tokens_per_s"]))
    if not lines:
        return
    figure = Figure(figsize=(5 * len(lines), 4), layout="constrained")
    for axes, (size, panel) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for who, points in panel.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=who)
        axes.set(xlabel="tokens a step", ylabel="tokens/s", title=size, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    *files, target = (Path(word) for word in sys.argv[1:])
    outputs.file(target)
    plot(chain.from_iterable(json.loads(file.read_text())["parts"].items() for file in files), target)
