"""What a soak's looks say: memory at the beginning and the end of its quiet part, growth a transcript, and a plot.

Must not know: processes. A look: {"at" seconds, "sent" transcripts, bytes by part, ...}, as soak.py takes it.
"""

import json
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from matplotlib.figure import Figure

PARTS = ("server", "worker", "redis", "dashboard")
"""Processes of ours; each with its children. Bytes are their proportional share (PSS)."""
GROWING = ("redis used", "redis disk", "state")
FLAT = 0.05
"""By how much a process may be above its first tenth in the last one."""
SLACK = 4 << 20
"""Bytes below which a difference is no growth: a dashboard's 5 % is less than a page of a thread's stack."""


def verdict(report: dict[str, Any], settled: float) -> dict[str, Any]:
    """settled: the share of the time after which nothing is started again.

    Redis is not asked to be flat: it keeps the ledger, the jobs of seven days and what was recorded. It grows by a
    transcript, which is said.
    """
    looks = [look for look in report["looks"] if look["at"] >= settled * report["seconds"]]
    tenth = max(len(looks) // 10, 3)
    first, last = looks[:tenth], looks[-tenth:]
    found: dict[str, Any] = {"memory": {}, "bytes a transcript": {}}
    for part in (*PARTS, "device"):
        before, after = (median(look[part] for look in some) for some in (first, last))
        if before:
            found["memory"][part] = {"before": before, "after": after, "ratio": after / before}
    for name in GROWING:
        slope = linear_regression([look["sent"] for look in looks], [look[name] for look in looks]).slope
        found["bytes a transcript"][name] = slope
    ours = [part for part in found["memory"] if part != "redis"]
    rise = {part: found["memory"][part]["after"] - found["memory"][part]["before"] for part in ours}
    grown = [part for part in ours if found["memory"][part]["ratio"] > 1 + FLAT and rise[part] > SLACK]
    return found | {"grown": grown, "flat": not grown}


def save(report: dict[str, Any], folder: Path) -> None:
    """soak.json and soak.png in `folder`."""
    (folder / "soak.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    if len(report["looks"]) > 2:
        plot(report).savefig(folder / "soak.png", dpi=90)


def plot(report: dict[str, Any]) -> Figure:
    """Memory by process, and what Redis and the disk hold, over time; what was started again is a line."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    minutes = [look["at"] / 60 for look in report["looks"]]
    for part in PARTS:
        above.plot(minutes, [look[part] / 1e6 for look in report["looks"]], label=part)
    for name in GROWING:
        below.plot(minutes, [look[name] / 1e6 for look in report["looks"]], label=name)
    above.set_ylabel("memory (PSS), MB")
    above.set_yscale("log")
    below.set_ylabel("MB")
    below.set_xlabel("minutes")
    for event in report["events"]:
        for axis in (above, below):
            axis.axvline(event["at"] / 60, color="grey", linewidth=0.8, linestyle=":")
        above.annotate(
            event["what"], (event["at"] / 60, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=30
        )
    for axis in (above, below):
        axis.legend(loc="upper right", fontsize=8)
        axis.grid(alpha=0.3)
    return figure
