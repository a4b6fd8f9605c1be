"""The metrics of one port as prometheus_client's objects, in the registry that the port shows.

Must not know: torch, vLLM, Redis.
Invariants: what is not in the table (metrics.py) cannot be set; a label's value that is not listed there is refused; a
counter with listed values shows 0 for each from the start.
"""

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from worker.utils.metrics import METRICS, SECONDS, Metric, Port

T = TypeVar("T", Counter, Gauge, Histogram)
Values = Mapping[str, Mapping[tuple[str, ...], float]]
"""Metric -> values of its labels, in the table's order -> value. A metric without labels: {(): value}."""


class Counted:
    """What is counted as it happens: the metrics of `port` that are not looked up, registered in `registry`.

    also: names of looked-up ones that are set by hand here. Gauges of several processes of one server (vLLM's
    multiprocess mode) show what was set last.
    """

    def __init__(self, port: Port, registry: CollectorRegistry, also: Iterable[str] = ()) -> None:
        wanted = [one for one in METRICS.values() if port in one.ports and (not one.looked_up or one.name in also)]
        self._made = {metric.name: _made(metric, registry) for metric in wanted}
        self.set("tandem_build_info", 1, importlib.metadata.version("tandem-worker"))

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Add `amount`, at least 0, to a counter."""
        self._of(name, labels, Counter).inc(amount)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._of(name, labels, Gauge).set(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One more value for a histogram."""
        self._of(name, labels, Histogram).observe(value)

    def choose(self, name: str, state: str) -> None:
        """1 for `state`, 0 for the others, of a gauge with one label."""
        (states,) = METRICS[name].labels.values()
        for one in states:
            self.set(name, one == state, one)

    def _of(self, name: str, labels: tuple[str, ...], kind: type[T]) -> T:
        made = self._made[name]
        check(METRICS[name], labels)
        assert isinstance(made, kind), f"{name} is no {kind.__name__}"
        return made.labels(*labels) if labels else made


def _made(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = tuple(metric.labels)
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode="mostrecent")
    made: Counter | Histogram
    if metric.kind == "counter":
        made = Counter(metric.name, metric.help, labels, registry=registry)
    else:
        made = Histogram(metric.name, metric.help, labels, registry=registry, buckets=SECONDS)
    for values in product(*metric.labels.values()) if labels else ():
        made.labels(*values)
    return made


def check(metric: Metric, labels: tuple[str, ...]) -> None:
    """ValueError where `labels` are not values that the table lists for `metric`."""
    for (label, listed), value in zip(metric.labels.items(), labels, strict=True):
        if listed and value not in listed:
            raise ValueError(f"{metric.name}: {value!r} is not listed for the label {label!r}")


class LookedUp(Collector):
    """What was looked up last, as metrics: `values()` gives it. What is not in it is not shown."""

    def __init__(self, values: Callable[[], Values]) -> None:
        self._values = values

    def collect(self) -> Iterable[Family]:
        for name, values in self._values().items():
            metric = METRICS[name]
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(name, metric.help, labels=tuple(metric.labels))
            for labels, value in values.items():
                check(metric, labels)
                family.add_metric(labels, value)
            yield family

    def describe(self) -> Iterable[Family]:
        """Nothing: a registry would otherwise look everything up when this is registered."""
        return ()
