"""Numbers, times and sentences as the page writes them: Jinja's filters.

Must not know: Redis, torch.
Invariant: everything that comes in is text to be escaped; only the marks made here are HTML.
"""

import math
import re
import time
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

NOTHING = "–"
SMALL = 1e-3


def number(value: Any, digits: int = 4) -> str:
    """3,214 · 1.234 · 1.2e-4 · 3.2e15; a dash for nothing, words for what is not finite."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if abs(value) >= 1e15:
        return _power(f"{float(value):.{digits - 2}e}")
    if float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < SMALL:
        return _power(f"{value:.{digits - 2}e}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 6)}f}"


def _power(text: str) -> str:
    """1.20e-04 as 1.2e-4."""
    digits, _, power = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits}e{int(power)}"


def seconds(value: Any) -> str:
    """12 ms · 1.23 s · 4.1 min."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    if 0.01 <= abs(value) < 1:
        return f"{1000 * value:.0f} ms"
    for limit, scale, unit in ((1, 1000, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if abs(value) < limit:
            return f"{number(value * scale, 3)} {unit}"
    return f"{number(value / 3600, 3)} h"


def percent(value: Any) -> str:
    """99.1 % of a part from 0 to 1."""
    return f"{number(100 * value, 3)} %" if isinstance(value, int | float) else NOTHING


def moment(value: Any) -> datetime | None:
    """Seconds since 1970, or a datetime, as one in UTC; None for what is no time."""
    try:
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else None
    except (ValueError, OverflowError, OSError):
        return None


def clock(value: Any) -> Markup:
    """<time> with the date, which a narrow table leaves out, and the second, in UTC."""
    at = moment(value)
    if at is None:
        return Markup(NOTHING)
    exact, date, time_of_day = at.isoformat(timespec="seconds"), at.strftime("%Y-%m-%d"), at.strftime("%H:%M:%S")
    return Markup('<time datetime="{}"><span class="date">{}</span> {}</time>').format(exact, date, time_of_day)


def short_clock(value: float, span: float) -> str:
    """The time of day, with the date where `span` seconds are more than a day."""
    at = moment(value)
    if at is None:
        return NOTHING
    return at.strftime("%m-%d %H:%M" if span > 86400 else "%H:%M" if span > 900 else "%H:%M:%S")


def ago(value: Any) -> str:
    """3 s ago, 5 min ago, 2 h ago, 4 days ago: of seconds since 1970, or of a datetime."""
    at = moment(value)
    if at is None:
        return NOTHING
    passed = max(0.0, time.time() - at.timestamp())
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if passed < limit:
            return f"{passed / unit:.0f} {name} ago"
    return f"{passed / 86400:,.0f} days ago"


def sentence(text: Any) -> Markup:
    """A sentence with `commands` in backticks as <code>."""
    return Markup(re.sub(r"`([^`]{1,200})`", r"<code>\1</code>", str(escape(text))))


FILTERS = {
    "number": number,
    "seconds": seconds,
    "percent": percent,
    "clock": clock,
    "ago": ago,
    "sentence": sentence,
}
