"""What a worker's metrics say: counted by its hooks as things happen, or looked up by a thread every few seconds.

    metrics = WorkerMetrics(redis_url, run_dir)
    with metrics.serving("127.0.0.1", 9184):        # GET /metrics from here on
        WorkerLoop(..., hooks=[LogHooks(), metrics], tell=metrics.telling(log_report))

Must not know: vLLM.
Invariants: a scrape asks nobody and waits for nobody, however often it comes; the thread that looks things up touches
neither the weights nor the device; what is not known is not shown.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client import disable_created_metrics as no_created_series

from worker.checkpoint.state_dir import free_bytes, used_bytes
from worker.consumer.events import Hooks, JobsRecovered, Notice, RedisBack
from worker.operations.looked_up import values
from worker.operations.status import gather
from worker.orchestrator.reports import CommittedAgain, Lost, Refilled, Report, RolledBack, Tell
from worker.utils.metrics import PARTS
from worker.utils.metrics_http import serve
from worker.utils.metrics_registry import Counted, LookedUp, Values

log = logging.getLogger("tandem.worker")

LOOK_SECONDS = 5.0
"""Between two looks: of a scrape every 15 s, each sees something new."""
SEARCHED = 100
"""Ids at the front of the queue that are looked at for jobs that are gone: all of a long queue would take too long."""


class WorkerMetrics(Hooks):
    """Of the worker on the queue of `redis_url` and the server of `run_dir`. Hooks are called in one thread."""

    def __init__(self, redis_url: str, run_dir: Path) -> None:
        self.redis_url, self.run_dir = redis_url, run_dir
        self.state_dir: Path | None = None
        """Where journal and checkpoints lie, once that is known."""
        self.version: int | None = None
        """What the header said last; told by the thread that writes it, since only that may read the device."""
        no_created_series()
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._counted = Counted("worker", self.registry)
        self._found: Values = {}
        self.registry.register(LookedUp(lambda: self._found))

    @contextlib.contextmanager
    def serving(self, host: str, port: int) -> Iterator[str]:
        """Serve them on `host`:`port` (0: a free one) within the block; gives their URL. TandemError when that port
        cannot be had."""
        ended = threading.Event()
        looking = threading.Thread(target=self._keep_looking, args=(ended,), name="tandem-metrics", daemon=True)
        with serve(self.registry, host, port) as url:
            looking.start()
            try:
                yield url
            finally:
                ended.set()
                looking.join()

    def began(self, version: int, state_dir: Path) -> None:
        """The weights are at `version`, and what is kept of them lies in `state_dir`."""
        self.version, self.state_dir = version, state_dir

    # Counted

    def on_version(self, line: dict[str, Any]) -> None:
        self.version = line["version"]
        counted = self._counted
        counted.add("tandem_versions_total")
        counted.add("tandem_jobs_total", line["jobs"], "trained")
        counted.add("tandem_tokens_total", line.get("tokens", 0))
        counted.add("tandem_trained_tokens_total", line.get("trained_tokens", 0))
        counted.add("tandem_serving_cost_seconds_total", line.get("serving_cost_s", 0.0))
        if (ratio := line.get("update_ratio")) is not None:
            counted.set("tandem_update_ratio", ratio)
        kinds = line.get("kinds") or {"demonstration": {"jobs": line["jobs"], "loss": line.get("loss")}}
        for kind, of in kinds.items():
            counted.add("tandem_trained_jobs_total", of["jobs"], kind)
            if of["loss"] is not None:
                counted.set("tandem_loss", of["loss"], kind)
        for part in PARTS:
            if (seconds := line.get(f"{part}_s")) is not None:
                counted.observe("tandem_version_seconds", seconds, part)

    def on_rejected(self, job_id: str, reason: str) -> None:
        self._counted.add("tandem_jobs_total", 1, "failed")

    def on_already_trained(self, job_id: str, version: int) -> None:
        self._counted.add("tandem_jobs_total", 1, "already_trained")

    def on_split(self, jobs: int, error: str) -> None:
        self._counted.add("tandem_splits_total")

    def on_notice(self, notice: Notice) -> None:
        if isinstance(notice, JobsRecovered | RedisBack):
            self._recovered("dead_worker" if isinstance(notice, JobsRecovered) else "redis_away")

    def telling(self, tell: Tell) -> Tell:
        """`tell`, and counting what it is told."""

        def both(report: Report) -> None:
            self._report(report)
            tell(report)

        return both

    def _report(self, report: Report) -> None:
        match report:
            case Lost():
                self._recovered("torn" if report.torn else "lost")
            case CommittedAgain():
                self._recovered("committed")
            case Refilled():
                self._recovered("refilled")
            case RolledBack():
                self._counted.add("tandem_rollbacks_total")
                self.version = report.version

    def _recovered(self, what: str) -> None:
        self._counted.add("tandem_recoveries_total", 1, what)

    # Looked up

    def _keep_looking(self, ended: threading.Event) -> None:
        failed = ""
        while True:
            try:
                self._found, failed = self.look(), ""
            except Exception as error:  # they must not be shown as if they were still so; and the worker goes on
                self._found = {}
                if failed != (failed := type(error).__name__):
                    log.exception("looking up the metrics of queue, Redis and disk failed; it is tried on")
            if ended.wait(LOOK_SECONDS):
                return

    def look(self) -> Values:
        """Queue, Redis, server, worker and disk as they are now."""
        status = gather(self.redis_url, self.run_dir, SEARCHED)
        return values(status, self.version, _disk(self.state_dir), time.time())


def _disk(state_dir: Path | None) -> dict[str, float]:
    """Metric -> value, of the folders of `state_dir`."""
    if state_dir is None:
        return {}
    checkpoints = state_dir / "checkpoints"
    return {
        "tandem_journal_bytes": used_bytes(state_dir / "journal"),
        "tandem_checkpoint_bytes": used_bytes(checkpoints),
        "tandem_checkpoints": sum(one.name.isdecimal() for one in checkpoints.iterdir()),
        "tandem_state_free_bytes": free_bytes(state_dir),
    }
