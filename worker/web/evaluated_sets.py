"""A named set's evaluations as the page shows them: the newest figures, the change since the first, curves.

Must not know: torch, RQ.
Invariant: figures are compared only with those of the same conversations (digest) and the same lineage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from worker.operations.history import as_time
from worker.versions.evaluations import Evaluation
from worker.web.charts import Chart, Point, Series
from worker.web.texts import moment, number, percent

Figure = Callable[[Evaluation], float | None]


@dataclass(frozen=True)
class EvaluatedSet:
    """all: every stored evaluation, the earliest version first. same: those the newest can be compared with, and it
    last. live: whether the newest is of the lineage that is live."""

    name: str
    all: Sequence[Evaluation]
    same: Sequence[Evaluation]
    live: bool

    @staticmethod
    def of(stored: Sequence[Evaluation], lineage: str | None) -> "EvaluatedSet":
        """From what is stored of one set, which is not nothing; lineage: the live one, whose evaluations come first."""
        ours = [one for one in stored if one.lineage == lineage]
        newest = max(ours or stored, key=lambda one: (one.version, one.at))
        same = [one for one in stored if (one.digest, one.lineage) == (newest.digest, newest.lineage)]
        return EvaluatedSet(newest.name, stored, same, bool(ours))

    @property
    def newest(self) -> Evaluation:
        return self.same[-1]

    @property
    def first(self) -> Evaluation | None:
        """What the newest is compared with: the earliest version; None where there is only one."""
        return self.same[0] if self.same[0].version < self.newest.version else None

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """What was measured, then (in `first`), now, and the change."""
        found = []
        for title, figure, shown in FIGURES:
            now, then = figure(self.newest), figure(self.first) if self.first else None
            if now is None:
                continue
            change = "" if then is None else _signed(now - then, shown)
            found.append((title, "" if then is None else shown(then), shown(now), change))
        return found

    def charts(self, times: bool) -> list[Chart]:
        """Loss, and where they were asked for exact matches and wins."""
        return [
            chart for title, figure, shown in FIGURES if not (chart := self._chart(title, figure, shown, times)).empty
        ]

    def _chart(self, title: str, figure: Figure, shown: Callable[[float], str], times: bool) -> Chart:
        found = [(one, y) for one in self.same if (y := figure(one)) is not None]
        placed = [(one, y, _x(one, times)) for one, y in found]
        points = [Point(x, y, f"version {one.version}") for one, y, x in placed if x is not None]
        return Chart(
            f"{_id(self.name)}-{_id(title)}", title, "nats a trained token" if title == "Loss" else "", HOW[title],
            series=[Series(title.lower(), points)],
            times=times, high=None if title == "Loss" else 1.0,
            axis=None if shown is number else shown,
            header=("Version", "Time (UTC)", title, "How"),
            rows=[(f"{one.version:,}", _when(one.at), shown(y), one.where) for one, y in reversed(found)],
            latest=shown(found[-1][1]) if found else "",
        )  # fmt: skip


FIGURES: list[tuple[str, Figure, Callable[[float], str]]] = [
    ("Loss", lambda one: one.loss, number),
    ("Exact match", lambda one: one.exact_match, percent),
    ("Win rate", lambda one: one.win_rate, percent),
]
HOW = {
    "Loss": "of the whole set",
    "Exact match": "greedy answers that are the reference",
    "Win rate": "pairs whose chosen answer is the likelier by token",
}


def _x(one: Evaluation, times: bool) -> float | None:
    return as_time(one.at) if times else float(one.version)


def _when(at: str) -> str:
    found = moment(as_time(at))
    return f"{found:%Y-%m-%d %H:%M:%S}" if found else "–"


def _signed(change: float, shown: Callable[[float], str]) -> str:
    """A change with its sign; of a rate in points, since a percentage of it could be meant."""
    size = shown(abs(change)).replace(" %", " points")
    return ("+" if change > 0 else "−" if change < 0 else "±") + size


def _id(text: str) -> str:
    """As an element's id: other characters become their numbers, so that two names never share one."""
    return "set-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c)}" for c in text)
