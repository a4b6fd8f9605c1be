"""Which charts the page shows of a history, and what stands in the table behind each.

Must not know: torch, RQ.
"""

import math
from collections.abc import Callable, Sequence

from worker.operations.history import Happening, History, Version
from worker.web.charts import Chart, Point, Series
from worker.web.texts import moment, number, percent, seconds

KINDS = ("demonstration", "distilled", "liked", "correction", "disliked", "comment")
"""In the order in which they take shape and colour, so that a kind always looks the same."""
MINUTE = 60.0
Value = Callable[[Version], float | None]


def charts(history: History, *, times: bool) -> list[Chart]:
    """Of the versions of `history`, oldest to the left. times: over time rather than over versions."""
    versions = [one for one in reversed(history.versions) if not times or one.at is not None]
    marks = [
        (_x(v, times), f"version {v.number}: back to version {v.target}") for v in versions if v.kind == "rollback"
    ]
    draw = _Curves(versions, marks, times)
    kept = serving_kept(versions)
    return [
        draw.losses(),
        draw.canary(history.happenings),
        draw.one("ratio", "Update ratio", "", "RMS of the update over RMS of the weights", _number("update_ratio")),
        draw.one("speed", "Tokens a second", "", "all tokens of a version over the seconds of its step", _speed),
        draw.one("pause", "Pause", "", "how long the server stood still for the version", _number("pause_s"), seconds),
        draw.one(
            "serving", "Left to serving", "",
            "of the minute up to each version: the part that updates did not take from running requests",
            lambda version: kept.get(version.number), percent, high=1.0,
        ),
    ]  # fmt: skip


def serving_kept(versions: Sequence[Version]) -> dict[int, float]:
    """Version -> the part of the minute before it that updates left to serving, from 0 to 1. versions: oldest first."""
    known = [(one.at, one.numbers.get("serving_cost_s"), one.number) for one in versions]
    charged = [(at, cost, n) for at, cost, n in known if at is not None and cost is not None and 0 <= cost < math.inf]
    found = {}
    for place, (at, _, version) in enumerate(charged):
        taken = 0.0
        for before, cost, _ in reversed(charged[: place + 1]):
            if before <= at - MINUTE:
                break
            taken += cost
        found[version] = max(0.0, 1 - taken / MINUTE)
    return found


def _number(name: str) -> Value:
    return lambda version: version.numbers.get(name)


def _speed(version: Version) -> float | None:
    return version.tokens_per_second


def _x(version: Version, times: bool) -> float:
    return (version.at or 0.0) if times else float(version.number)


def _label(version: Version) -> str:
    at = moment(version.at)
    return f"version {version.number}" + (f", {at:%H:%M:%S} UTC" if at else "")


def _when(at: float | None) -> str:
    found = moment(at)
    return f"{found:%Y-%m-%d %H:%M:%S}" if found else "–"


def _at(one: Happening) -> str:
    at = moment(one.at)
    return f"version {one.version}" + (f", {at:%H:%M:%S} UTC" if at else "")


class _Curves:
    """Charts of the same versions, oldest first."""

    def __init__(self, versions: Sequence[Version], marks: Sequence[tuple[float, str]], times: bool) -> None:
        self.versions, self.marks, self.times = versions, marks, times
        self.span = (_x(versions[0], times), _x(versions[-1], times)) if versions else None

    def one(
        self, id: str, title: str, unit: str, says: str, value: Value,
        shown: Callable[[float | None], str] = number, *, high: float | None = None,
    ) -> Chart:  # fmt: skip
        """A chart of one number a version."""
        found = [(version, value(version)) for version in self.versions]
        found = [(version, y) for version, y in found if y is not None]
        return Chart(
            id, title, unit, says,
            series=[Series(title.lower(), [Point(_x(v, self.times), y, _label(v)) for v, y in found])],
            times=self.times, span=self.span, high=high, marks=self.marks,
            axis=None if shown is number else shown,
            header=("Version", "Time (UTC)", title),
            rows=[(f"{v.number:,}", _when(v.at), shown(y)) for v, y in reversed(found)],
            latest=shown(found[-1][1]) if found else "",
        )  # fmt: skip

    def losses(self) -> Chart:
        """The loss by kind of feedback. A version without kinds is all demonstrations."""
        by_kind: dict[str, list[Point]] = {}
        rows, latest = [], ""
        for version in self.versions:
            loss = version.numbers.get("loss")
            if version.kind == "rollback" or (loss is None and not version.kinds):
                continue
            kinds: dict[str, float | None] = {name: of.loss for name, of in version.kinds.items()}
            kinds = kinds or {"demonstration": loss}
            for kind, value in kinds.items():
                by_kind.setdefault(kind, []).append(Point(_x(version, self.times), value, _label(version)))
            parts = ", ".join(f"{kind} {number(value)}" for kind, value in kinds.items()) if version.kinds else ""
            rows.append((f"{version.number:,}", _when(version.at), number(loss), parts or "demonstration"))
            latest = number(loss)
        order = [*KINDS, *sorted(by_kind.keys() - set(KINDS))]
        return Chart(
            "loss", "Loss by kind", "nats a trained token",
            "of each version's own transcripts, before its update",
            series=[Series(kind, by_kind.get(kind, [])) for kind in order],
            times=self.times, span=self.span, marks=self.marks,
            header=("Version", "Time (UTC)", "Loss", "By kind"), rows=rows[::-1], latest=latest,
        )  # fmt: skip

    def canary(self, happenings: Sequence[Happening]) -> Chart:
        """What each canary set's loss was, where it was looked at."""
        first = self.versions[0].number if self.versions else 0
        looks = [one for one in reversed(happenings) if one.kind == "canary" and one.loss is not None]
        looks = [one for one in looks if one.version is not None and one.version >= first]
        names = list(dict.fromkeys(name for one in looks for name in one.losses))
        held = {name: list[Point]() for name in names}
        beyond: list[Point] = []
        for one in looks:
            x = one.at if self.times else float(one.version or 0)
            for name, loss in one.losses.items():
                failed = name in one.failed
                label = f"{_at(one)}: {name}" if failed and len(names) > 1 else _at(one)
                (beyond if failed else held[name]).append(Point(x, loss, label))
        return Chart(
            "canary", "Canary", "nats a trained token", "of the held-out sets that --canary names",
            series=[*(Series(name, held[name]) for name in names), Series("did not pass", beyond, bad=True)],
            times=self.times, span=self.span, marks=self.marks,
            header=("Version", "Time (UTC)", "Loss", "Verdict"),
            rows=[
                (f"{one.version:,}", _when(one.at), _losses(one), "passed" if one.passed else _failed(one))
                for one in reversed(looks)
            ],
            latest=_losses(looks[-1]) if looks else "",
        )  # fmt: skip


def _losses(one: Happening) -> str:
    """The number, or of several sets each with its name."""
    if len(one.losses) < 2:
        return number(one.loss)
    return ", ".join(f"{name} {number(loss)}" for name, loss in one.losses.items())


def _failed(one: Happening) -> str:
    which = f": {', '.join(sorted(one.failed))}" if one.failed and len(one.losses) > 1 else ""
    return f"did not pass{which}"
