"""Scrapes of a real server and a real worker, by hand and by Debian's Prometheus."""

import contextlib
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patience import PATIENCE, until
from prometheus_client.parser import text_string_to_metric_families as parsed
from stack_parts import Stack

from worker.testing.server_process import free_port
from worker.utils.metrics import METRICS
from worker.versions import evaluations
from worker.versions.evaluations import Score

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
ROOT = Path(__file__).parents[2]

Samples = dict[tuple[str, tuple[str, ...]], float]
"""(name, values of its labels in the order of their names) -> value."""


def scrape(url: str) -> Samples:
    """What /metrics at `url` says."""
    with urllib.request.urlopen(url, timeout=60) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def dashboard_queries() -> list[str]:
    """The queries of docs/grafana/tandem.json, with everything chosen and a minute as interval."""
    page = json.loads((ROOT / "docs" / "grafana" / "tandem.json").read_text())
    queries = [target["expr"] for panel in page["panels"] for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "1m").replace("$deployment", ".*") for query in queries]


def unknown_metrics(query: str) -> set[str]:
    """Names of ours in a PromQL expression that are no metric's."""
    known = set(METRICS) | {
        f"{name}_{part}"
        for name, one in METRICS.items()
        if one.kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    return set(re.findall(r"tandem_\w+", query)) - known


@dataclass(frozen=True)
class Seen:
    """server, worker: what each port said. asked: Prometheus' answer by query of the dashboard; None: none is here."""

    server: Samples
    worker: Samples
    asked: dict[str, list[Any]] | None


def canary_options(folder: Path) -> list[str]:
    """A worker's options, for a canary set that always passes."""
    file = folder / "canary.jsonl"
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A tandem."}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    return ["--canary", str(file), "--canary-bound", "1000", "--canary-every", "2"]


def observe(stack: Stack, worker: "subprocess.Popen[str]", folder: Path) -> Seen:
    """All that is to be seen of a worker with --metrics-port 0 that has trained, and of its server."""
    live = stack.weights_version()
    found = evaluations.evaluation(
        "facts", live["version"], live["lineage"], "d", [Score(2.0, 4, exact=True, margin=0.5)], "live"
    )
    evaluations.keep(stack.redis, found)
    url = re.search(r"metrics: (http://127\.0\.0\.1:\d+/metrics)", stack.said(worker))
    assert url, stack.said(worker)
    stack.wait_until(worker, lambda: ("tandem_evaluation_loss", ("facts",)) in scrape(url[1]), "look again")
    server_url = stack.server.url + "/metrics"
    asked = None
    if PROMETHEUS:
        with prometheus({"tandem-server": server_url, "tandem-worker": url[1]}, folder) as prom:
            asked = {expression: prom(expression) for expression in dashboard_queries()}
    return Seen(scrape(server_url), scrape(url[1]), asked)


def check_values(seen: Seen) -> None:
    """Every metric has a value where the table says, and those that must agree do."""
    for port, found in (("server", seen.server), ("worker", seen.worker)):
        names = {re.sub("_(count|sum|bucket)$", "", name) for name, _ in found}
        missing = {metric.name for metric in METRICS.values() if port in metric.ports} - names
        assert not missing, f"{port}: no value for {missing}"
    worker, server = seen.worker, seen.server
    version = worker["tandem_version", ("header",)]
    assert version == worker["tandem_version", ("redis",)] == server["tandem_version", ("server",)] >= 5
    assert worker["tandem_jobs_total", ("trained",)] == 20 and worker["tandem_versions_total", ()] == version
    assert server["tandem_pause_seconds_count", ()] == version and server["tandem_trainer_connected", ()] == 1
    assert worker["tandem_version_seconds_count", ("journal",)] == version
    assert server["tandem_server_state", ("serving",)] == 1 and worker["tandem_journal_bytes", ()] > 1000
    assert any(name.startswith("vllm:") for name, _ in server), "vLLM's own are there as before"


@contextlib.contextmanager
def prometheus(targets: dict[str, str], folder: Path) -> Iterator[Any]:
    """A real Prometheus that scrapes `targets` (job -> URL); gives a function that asks it, once it has a few
    scrapes of each."""
    assert PROMETHEUS
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc]}]}
        for job, url in targets.items()
    ]
    config = folder / "prometheus.yml"  # JSON is YAML
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    port = free_port()
    command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ask(expression: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=60) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        result: list[Any] = answer["data"]["result"]
        return result

    def scraped() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        try:
            counts = ask("count_over_time(up[1h]) > 3 and min_over_time(up[1h]) == 1")
        except OSError:
            return False
        return {one["metric"]["job"] for one in counts} == set(targets)

    try:
        until(scraped, "Prometheus scrapes all", pace=0.2)
        yield ask
    finally:
        process.terminate()
        process.wait(PATIENCE)
