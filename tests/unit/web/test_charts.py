"""Charts as they are drawn: well-formed, within their frame, whatever the numbers are."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.operations.history import Version
from worker.web.charts import BOTTOM, STYLES, TOP, Chart, Point, Series, draw, plain_axis, ticks
from worker.web.curves import serving_kept
from worker.web.texts import ago, clock, number, percent, seconds, sentence

SCRIPT = "<script>\"&'"
values = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**20), 10**20).map(float))


def chart(*series: Series, **more: object) -> Chart:
    return Chart("one", SCRIPT, "", SCRIPT, series, **more)  # type: ignore[arg-type]


def drawn(found: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(draw(found)))


@given(st.lists(st.lists(values, max_size=40), min_size=1, max_size=7), st.booleans())
def test_whatever_the_numbers_are_the_points_lie_in_the_frame(losses: list[list[float | None]], times: bool) -> None:
    series = [
        Series(f"{SCRIPT}{i}", [Point(float(x), y, SCRIPT) for x, y in enumerate(of)]) for i, of in enumerate(losses)
    ]
    found = chart(*series, times=times, marks=[(1.0, SCRIPT)])
    drawable = [y for of in losses for y in of if y is not None and math.isfinite(y) and abs(y) < 1e15]
    assert found.empty == (not drawable)
    if drawable:
        root = drawn(found)
        points = root.findall(".//use")
        assert len(points) == len(drawable)
        for point in points:
            assert TOP - 0.1 <= float(point.get("y", "nan")) <= BOTTOM + 0.1
            assert 0 <= float(point.get("x", "").rstrip("%")) <= 100


@given(st.floats(-1e14, 1e14), st.floats(0, 1e14))
def test_ticks_are_few_round_and_around_the_values(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    slack = 1e-6 * max(abs(low), abs(low + span), 1e-9)
    assert found[0] <= low + slack and found[-1] >= low + span - slack


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-4, 2.5, 9e14])
@pytest.mark.parametrize("apart", [0.0, 2.3e-16, 1e-15, 1e-12, 3e-9])
@pytest.mark.parametrize("high", [None, 1.0])
def test_numbers_that_are_all_but_equal_are_drawn(size: float, apart: float, high: float | None) -> None:
    found = chart(Series("a", [Point(1.0, size, ""), Point(2.0, size * (1 + apart), "")]), high=high)
    for point in drawn(found).findall(".//use"):
        assert TOP - 0.1 <= float(point.get("y", "nan")) <= BOTTOM + 0.1


def test_a_line_breaks_where_there_is_nothing_and_many_points_are_smoothed() -> None:
    few = drawn(chart(Series("a", [Point(x, y, "") for x, y in enumerate([1.0, 2.0, None, 3.0, math.nan, 4.0])])))
    path = few.find(".//path")
    assert path is not None and path.get("d", "").count("M") == 3
    many = chart(Series("a", [Point(float(x), float(x % 2), "") for x in range(120)]))
    path = drawn(many).find(".//path")
    assert many.smooth == 10 and path is not None and path.get("d", "").count("L") == 119
    heights = [float(place.split()[1]) for place in path.get("d", "")[1:].split("L")]
    assert max(heights[10:]) - min(heights[10:]) < 1, "the mean of ups and downs is flat"


def test_a_kind_keeps_its_shape_when_others_have_no_points_and_failures_have_their_own() -> None:
    found = drawn(
        chart(Series("none", []), Series("some", [Point(1.0, 1.0, "")]), Series("no", [Point(1.0, 2.0, "")], bad=True))
    )
    shapes = [point.get("href") for point in found.findall(".//use")]
    assert shapes == ["#shape-s1", "#shape-bad"] and STYLES == 6


@pytest.mark.parametrize(
    ("scale", "texts"),
    [
        ([0, 0.5, 1, 1.5], ["0.0", "0.5", "1.0", "1.5"]),
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0, 5e-5, 1e-4], ["0", "5e-5", "1e-4"]),
        ([0, 2.5, 5], ["0.0", "2.5", "5.0"]),
    ],
)
def test_an_axis_has_as_many_places_as_its_step(scale: list[float], texts: list[str]) -> None:
    assert [plain_axis(scale)(tick) for tick in scale] == texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (True, "–"), ("3", "–"), (math.nan, "not a number"), (-math.inf, "infinite"), (0, "0"),
        (3214, "3,214"), (1.23456, "1.235"), (0.5, "0.5000"), (7.92e-5, "7.92e-5"), (1e-320, "1e-320"),
        (1e300, "1e300"), (1234.5, "1,234"), (10**30, "1e30"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: object, text: str) -> None:
    assert number(value) == text


def test_units_times_and_sentences_read_well() -> None:
    assert [seconds(x) for x in (0.0321, 0.0004, 1.234, 300, 9000, math.nan, None)] == [
        "32 ms", "0.400 ms", "1.23 s", "5 min", "2.50 h", "not a number", "–",
    ]  # fmt: skip
    assert percent(0.987) == "98.7 %" and percent(1) == "100 %"
    epoch = '<time datetime="1970-01-01T00:00:00+00:00"><span class="date">1970-01-01</span> 00:00:00</time>'
    assert clock(0.0) == epoch
    assert [clock(x) for x in (None, 1e300, math.nan)] == ["–"] * 3 and ago(1e300) == "–"
    assert sentence("start `tandem worker` <b>") == "start <code>tandem worker</code> &lt;b&gt;"


def test_what_updates_left_to_serving_is_of_the_minute_before() -> None:
    def version(number: int, at: float | None, cost: float) -> Version:
        return Version(number, at=at, numbers={"serving_cost_s": cost})

    found = serving_kept(
        [version(1, 0, 6), version(2, 30, 6), version(3, 60, 3), version(4, None, 3), version(5, 500, 99)]
    )
    assert found == {1: pytest.approx(0.9), 2: pytest.approx(0.8), 3: pytest.approx(0.85), 5: 0}
