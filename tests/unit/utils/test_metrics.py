"""The table of metrics keeps its own rules, and nothing that is not in it can be set."""

import json
import re
import socket
import subprocess
import sys
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families as parsed

from producer.errors import TandemError
from worker.utils import metrics_http
from worker.utils.metrics import GROUPS, METRICS, Metric
from worker.utils.metrics_http import CLIENT_SECONDS, is_loopback, serve
from worker.utils.metrics_registry import Counted, LookedUp

UNITS = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio", "seconds since 1970": "_timestamp_seconds"}
FREE = {"set", "version"}
"""Labels whose values the table cannot list: names that the operator gave canary sets; the release of Tandem."""


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_units_and_labels_are_in_prometheus_style(metric: Metric) -> None:
    assert re.fullmatch(r"tandem_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    if metric.unit in UNITS:
        assert metric.name.removesuffix("_total").endswith(UNITS[metric.unit])
    assert metric.help.endswith(".") or metric.help.startswith("1")
    for label, values in metric.labels.items():
        assert len(values) == len(set(values)) <= 12 and (bool(values) != (label in FREE)), label


def test_each_is_defined_once() -> None:
    assert len(METRICS) == sum(map(len, GROUPS.values()))


def served(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample that a scrape of `registry` gets, by name and labels."""
    with serve(registry, "127.0.0.1", 0) as url, urllib.request.urlopen(url, timeout=60) as reply:
        text = reply.read().decode()
    return {f"{s.name}{json.dumps(s.labels)}": s.value for family in parsed(text) for s in family.samples}


def test_a_scrape_gets_what_was_counted_and_counters_start_at_0() -> None:
    registry = CollectorRegistry()
    counted = Counted("worker", registry)
    counted.add("tandem_jobs_total", 3, "trained")
    counted.set("tandem_update_ratio", 1e-4)
    counted.observe("tandem_version_seconds", 0.3, "pause")
    registry.register(LookedUp(lambda: {"tandem_redis_up": {(): 1}, "tandem_queue_jobs": {("queued",): 5}}))
    found = served(registry)
    assert found['tandem_jobs_total{"outcome": "trained"}'] == 3
    assert found['tandem_jobs_total{"outcome": "failed"}'] == found["tandem_versions_total{}"] == 0
    assert found["tandem_update_ratio{}"] == 1e-4
    assert found['tandem_version_seconds_sum{"part": "pause"}'] == 0.3
    assert found['tandem_version_seconds_bucket{"le": "0.25", "part": "pause"}'] == 0
    assert found['tandem_version_seconds_bucket{"le": "0.5", "part": "pause"}'] == 1
    assert found["tandem_redis_up{}"] == 1 and found['tandem_queue_jobs{"state": "queued"}'] == 5
    assert not any(name.startswith("tandem_tears") for name in found), "that is the server's"


def test_what_the_table_does_not_list_is_refused() -> None:
    counted = Counted("worker", CollectorRegistry())
    with pytest.raises(ValueError, match="'chat-17' is not listed for the label 'outcome'"):
        counted.add("tandem_jobs_total", 1, "chat-17")
    with pytest.raises(KeyError):
        counted.add("tandem_other_total")
    with pytest.raises(ValueError, match="not listed"):
        list(LookedUp(lambda: {"tandem_queue_jobs": {("chat-17",): 1}}).collect())


def test_a_state_is_one_of_its_states() -> None:
    registry = CollectorRegistry()
    counted = Counted("server", registry, also=["tandem_server_state"])
    counted.choose("tandem_server_state", "paused")
    counted.choose("tandem_server_state", "serving")
    found = {name: value for name, value in served(registry).items() if name.startswith("tandem_server_state")}
    assert sum(found.values()) == 1 == found['tandem_server_state{"state": "serving"}'] and len(found) == 4


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = f"--metrics-port: cannot listen on 127.0.0.1:{port} .* choose another port"
        with pytest.raises(TandemError, match=taken), serve(CollectorRegistry(), "127.0.0.1", port):
            pass


def test_a_client_that_says_nothing_holds_up_no_scrape_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics_http._Handler.timeout == CLIENT_SECONDS < 15, "or clients that come with each scrape would add up"
    monkeypatch.setattr(metrics_http._Handler, "timeout", 0.2)
    with serve(CollectorRegistry(), "127.0.0.1", 0) as url:
        host, port = url.split("/")[2].split(":")
        with socket.create_connection((host, int(port))) as silent:
            with urllib.request.urlopen(url, timeout=60) as reply:
                assert reply.status == 200
            assert silent.recv(1) == b""


def test_which_addresses_are_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


def test_several_processes_of_one_server_are_added_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM's multiprocess mode: values lie in files, and /metrics is made of those alone."""
    folder = tmp_path_factory.mktemp("multi")
    one = (
        "from prometheus_client import REGISTRY\nfrom worker.utils.metrics_registry import Counted\n"
        "counted = Counted('server', REGISTRY, also=['tandem_server_state', 'tandem_version'])\n"
        "counted.add('tandem_feedback_requests_total', 2, '202'); counted.choose('tandem_server_state', 'serving')\n"
        "counted.set('tandem_version', 7, 'server'); counted.observe('tandem_pause_seconds', 0.2)\n"
    )
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", one], env=environment, check=True)
    text = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    lines = text.stdout.splitlines()
    assert 'tandem_feedback_requests_total{code="202"} 4.0' in lines
    assert 'tandem_server_state{state="serving"} 1.0' in lines and 'tandem_version{source="server"} 7.0' in lines
    assert "tandem_pause_seconds_count 2.0" in lines
