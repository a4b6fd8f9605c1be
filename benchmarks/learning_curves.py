"""What is read off the runs of learning.json: curves of settings, and what was forgotten where as much was learnt.

Must not know: models, how a run is made, how a result is shown.
Invariants: means are over trained tokens; differences are taken answer by answer and seed by seed before anything is
averaged. An interval is of 95 %: over the answers (ratio estimator on each answer's mean over seeds) and over the seeds
(Student's t on each seed's mean), the two halves added in squares. That is slightly too wide, because the noise of a
single answer in a single seed is in both; with one seed it is over answers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot
from typing import Any

from contenders import Setting

LEVEL = 0.45
"""Identity loss, in nats per trained token, at which what was forgotten is compared."""
BAND = tuple(round(0.6 * (0.35 / 0.6) ** (i / 8), 4) for i in range(9))
"""Levels about LEVEL, evenly spaced in logarithm: their mean depends less on single versions than one level does."""
REFERENCE = "adamw lr=0.0001"
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; the last for all above."""

Rows = dict[int, list[float]]
"""Seed -> a value of each answer."""


@dataclass(frozen=True)
class Interval:
    """Mean, and half the width of its interval over answers and over seeds (0 for one seed)."""

    mean: float
    answers: float
    seeds: float = 0.0

    @property
    def half(self) -> float:
        return hypot(self.answers, self.seeds)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ±{self.half:.3f}"


def mean(values: Sequence[float], tokens: Sequence[int]) -> float:
    return sum(v * n for v, n in zip(values, tokens, strict=True)) / sum(tokens)


def interval(rows: Rows, tokens: Sequence[int]) -> Interval:
    """Of the mean over seeds and tokens."""
    values = [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)]
    middle = mean(values, tokens)
    spread = sum((n * (v - middle)) ** 2 for v, n in zip(values, tokens, strict=True)) ** 0.5
    seeds = len(rows)
    if seeds == 1:
        return Interval(middle, 1.96 * spread / sum(tokens))
    error = (sum((mean(row, tokens) - middle) ** 2 for row in rows.values()) / (seeds - 1) / seeds) ** 0.5
    return Interval(middle, 1.96 * spread / sum(tokens), STUDENT[min(seeds - 1, len(STUDENT)) - 1] * error)


def difference(rows: Rows, reference: Rows) -> Rows:
    """rows - reference, answer by answer, for the seeds that both have."""
    return {seed: [a - b for a, b in zip(rows[seed], reference[seed], strict=True)]
            for seed in rows if seed in reference}  # fmt: skip


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
    """All seeds of one setting. `by_seed`: seed -> its points, the source weights' (version 0) first."""

    def __init__(self, report: dict[str, Any], keys: Sequence[str]) -> None:
        runs = [report["runs"][key] for key in keys]
        self.setting, self.seeds, self.tokens = Setting(**runs[0]["setting"]), len(runs), report["tokens"]
        self.name = without_seed(keys[0])
        self.versions = sorted(set.intersection(*(set(map(int, run["versions"])) for run in runs)))
        self.by_seed = {
            run["setting"].get("seed", 0): [self._point(report, 0, report["start"])]
            + [self._point(report, version, run["versions"][str(version)]) for version in self.versions]
            for run in runs
        }
        self.moved = runs[0]["moved"]

    def _point(self, report: dict[str, Any], version: int, scored: dict[str, list[float]]) -> Point:
        def rise(name: str) -> list[float]:
            return [after - before for after, before in zip(scored[name], report["start"][name], strict=True)]

        identity, facts = (mean(scored[name], self.tokens[name]) for name in ("identity", "facts"))
        return Point(version, identity, facts, rise("held"), rise("written") if "written" in scored else None,
                     rise("kl") if "kl" in scored else None)  # fmt: skip

    def at(self, version: int, what: str = "rise") -> tuple[float, float, Interval | None]:
        """Identity and facts, means over seeds, and the rise (or "kl"; None where it was not measured)."""
        points = {seed: next(p for p in some if p.version == version) for seed, some in self.by_seed.items()}
        identity, facts = (
            sum(getattr(p, name) for p in points.values()) / len(points) for name in ("identity", "facts")
        )
        rows = {seed: getattr(p, what) for seed, p in points.items()}
        return identity, facts, None if None in rows.values() else interval(rows, self.tokens["held"])

    def at_level(self, what: str = "rise", levels: Sequence[float] = (LEVEL,)) -> tuple[float, Rows] | None:
        """(version, rise of each answer by seed) where identity first falls through a level, straight lines between
        scored versions; the version is the mean over seeds, both are means over `levels`. None where a seed does not
        reach a level, does before its first scored version, or lacks `what`."""
        found = {seed: [_cross(points, what, level) for level in levels] for seed, points in self.by_seed.items()}
        if any(None in some for some in found.values()):
            return None
        there = {seed: [one for one in some if one is not None] for seed, some in found.items()}
        versions = [version for some in there.values() for version, _ in some]
        rows = {seed: [sum(column) / len(levels) for column in zip(*(rise for _, rise in some), strict=True)]
                for seed, some in there.items()}  # fmt: skip
        return sum(versions) / len(versions), rows


def _cross(points: Sequence[Point], what: str, level: float) -> tuple[float, list[float]] | None:
    for before, after in pairwise(points[1:]):
        if before.identity >= level > after.identity:
            share = (before.identity - level) / (before.identity - after.identity)
            both = getattr(before, what), getattr(after, what)
            if None in both:
                return None
            rise = [a + share * (b - a) for a, b in zip(*both, strict=True)]
            return before.version + share * (after.version - before.version), rise
    return None


def without_seed(key: str) -> str:
    return " ".join(part for part in key.split() if not part.startswith("seed="))


def curves(report: dict[str, Any]) -> list[Curve]:
    """One a setting, in the order in which they were first made."""
    keys: dict[str, list[str]] = {}
    for key in report["runs"]:
        keys.setdefault(without_seed(key), []).append(key)
    return [Curve(report, some) for some in keys.values()]
