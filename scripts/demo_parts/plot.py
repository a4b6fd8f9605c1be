"""The demo's figures as a plot and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from demo_parts.verdict import Seen

SERIES = {
    "learnt": ("who it is (never queued)", "C3"),
    "facts": ("facts", "C0"),
    "other": ("other answers", "C2"),
}


def save(folder: Path, title: str, versions: Sequence[Seen], back: Seen, target: Seen) -> Path:
    """Write learning.png and learning.json into `folder`; the plot's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"model": title, "versions": [asdict(one) for one in versions], "rollback": asdict(back)}
    (folder / "learning.json").write_text(json.dumps(figures | {"rollback_to": target.version}, indent=1) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    numbers = [one.version for one in versions]
    for field, (label, colour) in SERIES.items():
        axes.plot(numbers, [getattr(one, field) for one in versions], marker="o", color=colour, label=label)
        ends = [getattr(versions[-1], field), getattr(back, field)]
        axes.plot(
            [versions[-1].version, back.version],
            ends,
            marker="o",
            color=colour,
            linestyle=":",
            mfc="white",
            markevery=[1],
        )
    axes.annotate(
        f"rollback to {target.version}",
        (back.version, back.learnt),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
    )
    axes.set(xlabel="version of the weights", ylabel="loss, nats a token", title=title, ylim=(0, None))
    axes.set_xticks([*numbers, back.version])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / "learning.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path
