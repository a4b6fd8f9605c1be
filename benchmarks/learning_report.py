"""Table and plot of learning.json: how much was learnt, how much was forgotten, and both at one level of learning.

Must not know: models, how a run is made.
Invariants: means are over trained tokens; an interval is of 95 % over answers, each answer's mean over seeds being one
observation, and differences are taken answer by answer before anything is averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from contenders import LABELS, RULES, Setting
from matplotlib.figure import Figure

LEVEL = 0.45
"""Identity loss, in nats per trained token, at which what was forgotten is compared."""
REFERENCE = "adamw lr=0.0001"
ALLOWED = 0.006
"""By how much more than the reference's held-out loss a contender's may have risen at LEVEL, in nats."""
PEERS = ("adamw", "adamw-bf16", "lora", "sgd", "mini")


@dataclass(frozen=True)
class Interval:
    """Mean and half the width of its interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ±{self.half:.4f}"


def mean(values: Sequence[float], tokens: Sequence[int]) -> float:
    return sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)


def interval(values: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Of the mean over tokens, the answers being drawn at random (ratio estimator)."""
    middle = mean(values, tokens)
    spread = sum((n * (v - middle)) ** 2 for v, n in zip(values, tokens, strict=True)) ** 0.5
    return Interval(middle, 1.96 * spread / sum(tokens))


@dataclass(frozen=True)
class Point:
    """One contender and seed at one version."""

    version: int
    identity: float
    facts: float
    rise: list[float]
    """Of each held-out answer."""
    written: list[float] | None
    """The same of each answer by hand; None where they were not scored."""
    kl: list[float] | None = None
    """Divergence from the source weights before each token of a held-out answer; None where it was not measured."""


class Curve:
    """All seeds of one setting."""

    def __init__(self, report: dict[str, Any], keys: Sequence[str]) -> None:
        runs = [report["runs"][key] for key in keys]
        self.setting, self.seeds, self.tokens = Setting(**runs[0]["setting"]), len(runs), report["tokens"]
        self.name = _without_seed(keys[0])
        shared = sorted(set.intersection(*(set(map(int, run["versions"])) for run in runs)))
        self.versions = shared
        self.by_seed = [[self._point(report, 0, report["start"])]
                        + [self._point(report, version, run["versions"][str(version)]) for version in shared]
                        for run in runs]  # fmt: skip
        self.moved = runs[0]["moved"]

    def _point(self, report: dict[str, Any], version: int, scored: dict[str, list[float]]) -> Point:
        def rise(name: str) -> list[float]:
            return [after - before for after, before in zip(scored[name], report["start"][name], strict=True)]

        identity, facts = (mean(scored[name], self.tokens[name]) for name in ("identity", "facts"))
        return Point(version, identity, facts, rise("held"), rise("written") if "written" in scored else None,
                     rise("kl") if "kl" in scored else None)  # fmt: skip

    def at(self, version: int) -> tuple[float, float, Interval]:
        """Identity and facts, means over seeds, and the rise."""
        points = [next(p for p in points if p.version == version) for points in self.by_seed]
        identity, facts = (sum(getattr(p, name) for p in points) / len(points) for name in ("identity", "facts"))
        return identity, facts, interval(_means([p.rise for p in points]), self.tokens["held"])

    def at_level(self, what: str = "rise") -> tuple[float, list[float]] | None:
        """(version, rise of each answer) where identity falls through LEVEL, straight lines between scored versions and
        mean over seeds; None where a seed does not reach it, does before its first scored version, or lacks `what`."""
        found = [_cross(points, what) for points in self.by_seed]
        if any(one is None for one in found):
            return None
        there = [one for one in found if one is not None]
        return sum(version for version, _ in there) / len(there), _means([rise for _, rise in there])


def _cross(points: Sequence[Point], what: str) -> tuple[float, list[float]] | None:
    for before, after in pairwise(points[1:]):
        if before.identity >= LEVEL > after.identity:
            share = (before.identity - LEVEL) / (before.identity - after.identity)
            both = getattr(before, what), getattr(after, what)
            if None in both:
                return None
            rise = [a + share * (b - a) for a, b in zip(*both, strict=True)]
            return before.version + share * (after.version - before.version), rise
    return None


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _without_seed(key: str) -> str:
    return " ".join(part for part in key.split() if not part.startswith("seed="))


def curves(report: dict[str, Any]) -> list[Curve]:
    """One a setting, in the order in which they were first made."""
    keys: dict[str, list[str]] = {}
    for key in report["runs"]:
        keys.setdefault(_without_seed(key), []).append(key)
    return [Curve(report, some) for some in keys.values()]


def write(report: dict[str, Any], folder: Path) -> None:
    """learning.md and learning.png in `folder`."""
    found = curves(report)
    text = "\n\n".join(part for part in (table(report, found), in_turn(report)) if part)
    (folder / "learning.md").write_text(text + "\n")
    print(text)
    if found:
        plot(found, folder / "learning.png")


def table(report: dict[str, Any], found: Sequence[Curve]) -> str:
    """Every setting: scores by version, then the rise at LEVEL and by how much it is over the reference's."""
    if not found:
        return ""
    lines = [f"| contender | seeds | version: identity / facts / rise | at identity {LEVEL}: version | rise of held |"
             f" over {REFERENCE} | rise of written | dW/W at 1, last | RMS(dW)/lr at 1: median, 9th decile, most |",
             "|" + " --- |" * 9]  # fmt: skip
    reference = next((curve.at_level() for curve in found if curve.name == REFERENCE), None)
    tokens = report["tokens"]
    for curve in found:
        scores = [f"{v}: {i:.3f} / {f:.3f} / {r}" for v in curve.versions for i, f, r in [curve.at(v)]]
        level, written = curve.at_level(), curve.at_level("written")
        there = ["-"] * 4
        if level is not None:
            there[:2] = f"{level[0]:.1f}", str(interval(level[1], tokens["held"]))
            if reference is not None:
                over = [a - b for a, b in zip(level[1], reference[1], strict=True)]
                there[2] = str(interval(over, tokens["held"]))
        if written is not None:
            there[3] = str(interval(written[1], tokens["written"]))
        first, last = curve.moved["1"], curve.moved[max(curve.moved, key=int)]
        gains = " ".join(f"{gain:.2f}" for gain in first["gain"])
        lines.append(f"| {curve.setting.label} | {curve.seeds} | {'; '.join(scores)} | {' | '.join(there)} |"
                     f" {first['all']:.1e}, {last['all']:.1e} | {gains} |")  # fmt: skip
    start = [f"{name} {mean(values, tokens[name]):.3f}" for name, values in report["start"].items()]
    lines.append(f"\nSource weights: {', '.join(start)}; {len(tokens['held'])} held-out questions.")
    return "\n".join(lines)


def in_turn(report: dict[str, Any]) -> str:
    """Three tasks one after the other: loss of each after each."""
    if not report["in_turn"]:
        return ""
    tokens = report["tokens"]
    names = ("identity", "places", "manner", "facts", "held")
    lines = ["| contender | after | " + " | ".join(names) + " |", "|" + " --- |" * 7]
    for key, run in report["in_turn"].items():
        for task, scored in run["after"].items():
            losses = " | ".join(f"{mean(scored[name], tokens[name]):.3f}" for name in names)
            lines.append(f"| {key} | {task} | {losses} |")
    return "\n".join(lines)


def state_numbers(setting: Setting, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Numbers of optimizer state over matrices of these shapes; None where no rule says it."""
    name = "mini-plain" if setting.method == "mini" else setting.method
    if name not in RULES:
        return None
    return sum(RULES[name][1].numbers(*shape) for shape in shapes if len(shape) == 2)


def plot(found: Sequence[Curve], path: Path) -> None:
    """Left: the peers at every rate. Right: each candidate at its best, with AdamW and Mini."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    peers = [curve for curve in found if curve.setting.method in PEERS and len(curve.name.split()) == 2]
    others = _best(found)
    for axes, some, title in zip(panels, (peers, others), ("peers", "each candidate at its best"), strict=True):
        order, rates = list(LABELS), sorted({curve.setting.lr for curve in some})
        lines = {lr: ("-", "--", "-.", ":")[i % 4] for i, lr in enumerate(rates)}
        for curve in some:
            at = [(version, curve.at(version)) for version in curve.versions]
            x, y = [scored[0] for _, scored in at], [scored[2].mean for _, scored in at]
            style = {"adamw": "k", "mini": "C3"}.get(curve.setting.method, f"C{order.index(curve.setting.method) % 10}")
            axes.plot(
                x,
                y,
                color=style,
                marker="o",
                markersize=3,
                linewidth=1.3,
                linestyle=lines[curve.setting.lr],
                label=curve.setting.label,
            )
            for version, scored in at:
                where = (scored[0], scored[2].mean)
                axes.annotate(str(version), where, fontsize=6, xytext=(2, 3), textcoords="offset points")
        axes.axvline(LEVEL, color="grey", linewidth=0.7, linestyle=":")
        axes.set(xscale="log", xlabel="identity, never trained (nats per token)", title=title)
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("rise of held-out loss (nats per token)")
    figure.suptitle("Learnt (to the right) against forgotten (up); numbers are versions")
    figure.savefig(path, dpi=120)


def _best(found: Sequence[Curve]) -> list[Curve]:
    """Of each kind of setting the curve with the least rise at LEVEL; those that do not get there are left out."""
    best: dict[str, tuple[float, Curve]] = {}
    for curve in found:
        level = curve.at_level()
        if level is None:
            continue
        kind = " ".join(part for part in curve.name.split() if not part.startswith("lr="))
        rise = mean(level[1], curve.tokens["held"])
        if kind not in best or rise < best[kind][0]:
            best[kind] = (rise, curve)
    return [curve for _, curve in best.values()]
