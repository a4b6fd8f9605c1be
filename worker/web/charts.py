"""Charts as inline SVG, drawn on the server: lines over versions or over time, with marks of their own shape.

Must not know: Redis, torch.
Invariants: no style and no script is in the markup, which a strict Content-Security-Policy would refuse; what is not
finite, or beyond `FAR`, is not drawn (the table beside the chart says it); every text is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from worker.web.texts import number, short_clock

FAR = 1e15
HEIGHT, TOP, BOTTOM = 176, 14, 150
"""Of a chart in CSS pixels, and of the plot in it."""
LEFT, RIGHT = 10.0, 98.5
"""Where the plot begins and ends, in percent of the width."""
STYLES = 6
"""Series that look different: their shapes are in `templates/learning/shapes.html`."""
NEAR, TINY = 1e-9, 1e-300
"""A range of at most this part of its numbers, or of this size, is drawn as a level line."""
SMOOTH_FROM = 31
"""From so many points on, the line is a running mean, and the points stand alone."""


@dataclass(frozen=True)
class Point:
    """x: the version, or seconds since 1970; y: None where there is nothing, which ends the line."""

    x: float
    y: float | None
    label: str


@dataclass(frozen=True)
class Series:
    """One line. bad: its points are failures: no line, and the shape and colour of one."""

    name: str
    points: Sequence[Point]
    bad: bool = False


@dataclass(frozen=True)
class Chart:
    """times: x is time. span: where x begins and ends; None: with the points. low, high: the range never goes beyond
    them. marks: (x, text) of upright lines. axis: how a value is written beside the plot.

    header, rows: the header, and rows of cells, newest first: what is drawn, and what cannot be."""

    id: str
    title: str
    unit: str
    says: str
    series: Sequence[Series]
    times: bool = False
    span: tuple[float, float] | None = None
    low: float | None = 0.0
    high: float | None = None
    marks: Sequence[tuple[float, str]] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    latest: str = ""
    axis: Callable[[float], str] | None = None

    @property
    def empty(self) -> bool:
        return not any(_drawn(point) for series in self.series for point in series.points)

    @property
    def smooth(self) -> int:
        """Over how many points the line is a mean; 1: it goes through every one."""
        most = max((len(series.points) for series in self.series), default=0)
        return 1 if most < SMOOTH_FROM else math.ceil(most / 12)


def _drawn(point: Point) -> bool:
    return point.y is not None and math.isfinite(point.y) and abs(point.y) < FAR


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps apart."""
    span, size = high - low, max(abs(low), abs(high))
    if span <= max(NEAR * size, TINY):  # between them no two numbers could be told apart
        span = size if size > TINY else 1.0
        low, high = low - span / 2, low + span / 2
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def draw(chart: Chart) -> Markup:
    """The <svg> of a chart that is not empty; its title is the element with the id `<chart.id>-title`."""
    values = [p.y for s in chart.series for p in s.points if _drawn(p) and p.y is not None]
    low, high = min(values), max(values)
    if chart.low is not None and low < 3 * (high - low or abs(high)):  # near enough to the bound to show it
        low = min(low, chart.low)
    scale = ticks(low, high)
    if chart.high is not None:
        top = max(chart.high, high)  # Redis may hold a rate above 1: it is drawn where it is
        scale = [tick for tick in scale if tick <= top] or [top]
        scale += [top] if scale[-1] < high else []
    if len(scale) == 1:
        scale = [scale[0] - 1, scale[0]]
    xs = [point.x for series in chart.series for point in series.points] + list(chart.span or ())
    frame = _Frame(min(xs), max(xs), scale[0], scale[-1])
    parts = [_grid(frame, scale, chart.axis or plain_axis(scale)), _x_axis(frame, chart)]
    parts += [_mark(frame, x, text) for x, text in chart.marks if frame.left <= x <= frame.right]
    for place, series in enumerate(chart.series):
        name = "bad" if series.bad else f"s{place % STYLES}"
        if not series.bad:
            parts.append(_line(frame, series, chart.smooth, name))
        parts += [_point(frame, series, point, name) for point in series.points if _drawn(point)]
    return Markup(
        '<svg class="chart{}" width="100%" height="{}" role="img" aria-labelledby="{}-title {}-says">{}</svg>'
    ).format(" many" if chart.smooth > 1 else "", HEIGHT, chart.id, chart.id, Markup("").join(parts))


@dataclass(frozen=True)
class _Frame:
    """From values to places: x in percent of the width, y in pixels, both in thousandths of the plot."""

    left: float
    right: float
    bottom: float
    top: float

    def part_x(self, x: float) -> float:
        return (x - self.left) / (self.right - self.left) if self.right > self.left else 0.5

    def part_y(self, y: float) -> float:
        return 1 - (y - self.bottom) / (self.top - self.bottom)

    def x(self, x: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * self.part_x(x):.2f}%"

    def y(self, y: float) -> str:
        return f"{TOP + (BOTTOM - TOP) * self.part_y(y):.1f}"


def plain_axis(scale: Sequence[float]) -> Callable[[float], str]:
    """How the numbers of a scale are written: all with as many places as their step needs."""
    step = scale[1] - scale[0]
    most = max(abs(tick) for tick in scale)
    if most >= 1e6 or most < 1e-2:
        return number
    places = max(0, math.ceil(-math.log10(step) - 1e-9))
    places += round(step * 10**places, 6) != round(step * 10**places)  # 0.25 and its like
    return lambda tick: f"{tick:,.{places}f}"


def _grid(frame: _Frame, scale: Sequence[float], written: Callable[[float], str]) -> Markup:
    line = Markup('<line class="grid" x1="{}%" x2="{}%" y1="{y}" y2="{y}"/>')
    text = Markup('<text class="tick" x="{}%" y="{y}">{}</text>')
    found = Markup("")
    for tick in scale:
        y = frame.y(tick)
        found += line.format(LEFT, RIGHT, y=y) + text.format(LEFT - 1, written(tick), y=y)
    return found


def _x_axis(frame: _Frame, chart: Chart) -> Markup:
    places = [frame.left, (frame.left + frame.right) / 2, frame.right] if frame.right > frame.left else [frame.left]
    if not chart.times:
        places = sorted({round(place) for place in places})
    texts = []
    for place in places:
        text = short_clock(place, frame.right - frame.left) if chart.times else f"{place:,}"
        end = "start" if place == places[0] and len(places) > 1 else "end" if place == places[-1] else "middle"
        end = "middle" if len(places) == 1 else end
        texts.append(
            Markup('<text class="tick-x {}" x="{}" y="{}">{}</text>').format(end, frame.x(place), BOTTOM + 18, text)
        )
    return Markup("").join(texts)


def _mark(frame: _Frame, x: float, text: str) -> Markup:
    return Markup('<line class="mark" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>').format(
        frame.x(x), frame.x(x), TOP, BOTTOM, text
    )


def _line(frame: _Frame, series: Series, smooth: int, name: str) -> Markup:
    """A path in a box of 1000 by 1000 that is stretched over the plot; it breaks where nothing is."""
    path: list[str] = []
    window: list[float] = []
    broken = True
    for point in series.points:
        if not _drawn(point) or point.y is None:
            broken = smooth == 1
            continue
        window = [*window, point.y][-smooth:]
        x, y = frame.part_x(point.x), frame.part_y(sum(window) / len(window))
        path.append(f"{'M' if broken else 'L'}{1000 * x:.1f} {1000 * y:.1f}")
        broken = False
    return Markup(
        '<svg x="{}%" y="{}" width="{}%" height="{}" viewBox="0 0 1000 1000" preserveAspectRatio="none"'
        ' overflow="visible"><path class="line {}" d="{}"/></svg>'
    ).format(LEFT, TOP, RIGHT - LEFT, BOTTOM - TOP, name, " ".join(path))


def _point(frame: _Frame, series: Series, point: Point, name: str) -> Markup:
    said = f"{point.label}: {series.name} {number(point.y)}"
    return Markup('<use class="point {}" href="#shape-{}" x="{}" y="{}"><title>{}</title></use>').format(
        name, name, frame.x(point.x), frame.y(point.y or 0.0), said
    )
