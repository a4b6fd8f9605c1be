"""The table and the plot of serving.py's results. Must not know: how they were measured.

python benchmarks/serving_report.py results/serving.json serving.png
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STATES = ("alone", "training")


def rows_of(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, Mapping[str, float], float]]:
    """(server, load, state, figures, tokens/s x alone) of every measurement."""
    found = []
    for name, part in parts.items():
        server, _, load = name.partition(", ")
        for state in STATES:
            if isinstance(row := part.get(state), Mapping):
                alone = part.get("alone", {}).get("tokens_per_s")
                share = row["tokens_per_s"] / alone if alone else float("nan")
                found.append((server, load, state, row, share))
    return found


def show(parts: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="Serving beside training: medians over the rounds")
    columns = (
        "server, load",
        "",
        "tokens/s",
        "x alone",
        "requests",
        "first token s",
        "p50 ms",
        "p99",
        "p99.9",
        "worst",
    )
    for column in (*columns, "hits", "versions", "live after s", "paused"):
        table.add_column(column, justify="left" if column in ("server, load", "") else "right")
    for server, load, state, row, share in rows_of(parts):
        gaps = [f"{1000 * row[key]:,.0f}" for key in ("itl_p50", "itl_p99", "itl_p999", "itl_max")]
        hits = f"{row['prefix_hits'] / row['prefix_queries']:.0%}" if row.get("prefix_queries") else "-"
        cells = [
            f"{row['tokens_per_s']:,.0f}",
            f"{share:.2f}",
            f"{row['requests']:.0f}",
            f"{row['first_token_p50']:.2f}",
        ]
        more = ["", "", ""]
        if state == "training":
            latency = f"{row['latency_p50']:.2f} / {row['latency_max']:.2f}"
            more = [f"{row['versions']:.0f}", latency, f"{row['pause_share']:.0%}"]
        table.add_row(f"{server}, {load}", state, *cells, *gaps, hits, *more)
    Console(width=170).print(table)


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Tokens/s, first token and p99 gap of every load: a group of bars a load, a bar a server and state."""
    from matplotlib.figure import Figure

    rows = rows_of(parts)
    if not rows:
        return
    loads = list(dict.fromkeys(load for _, load, *_ in rows))
    bars = list(dict.fromkeys((server, state) for server, _, state, *_ in rows))
    panels = {"tokens_per_s": "tokens/s", "first_token_p50": "first token, median s", "itl_p99": "p99 gap, s"}
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, (server, state) in enumerate(bars):
            mine = {load: row[key] for one, load, what, row, _ in rows if (one, what) == (server, state)}
            at = [loads.index(load) + place * 0.8 / len(bars) for load in mine]
            axes.bar(at, list(mine.values()), 0.8 / len(bars), align="edge", label=f"{server}, {state}")
        axes.set_xticks([number + 0.4 for number in range(len(loads))], loads, rotation=20, fontsize=8)
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parts = json.loads(Path(sys.argv[1]).read_text())["parts"]
    show(parts)
    plot(parts, Path(sys.argv[2]))
