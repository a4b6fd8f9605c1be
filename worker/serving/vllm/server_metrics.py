"""What of the server vLLM's own /metrics shows: its state and version, pauses, completions kept, calls of feedback.

vLLM shows prometheus_client's registry of the process, or, in its multiprocess mode, files that every metric writes.
Only ordinary metrics, set when something happens, work in both: nothing here is computed when /metrics is read.
Must not know: vLLM.
Invariant: a metric that cannot be written never gets in the way of a pause, a resume or an answer.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from worker.serving.protocol import PAUSED, SERVING
from worker.serving.vllm.server_state import ServerState
from worker.utils.metrics import CODES
from worker.utils.metrics_registry import Counted

logger = logging.getLogger("vllm.tandem")


class ServerMetrics:
    """In `registry`, once. clock: seconds that only grow."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._counted = Counted("server", registry, also=("tandem_server_state", "tandem_version"))
        self._clock = clock
        self._since: float | None = None
        self._seen = {"tandem_tears_total": 0, "tandem_overdue_leases_total": 0}

    def watch(self, state: ServerState) -> None:
        """Show `state`, now and whenever it changes."""
        state.changed = lambda: self._safely(lambda: self._see(state))
        state.changed()

    def _see(self, state: ServerState) -> None:
        counted = self._counted
        counted.choose("tandem_server_state", state.condition)
        counted.set("tandem_version", state.version, "server")
        counted.set("tandem_trainer_connected", state.has_trainer)
        for name, total in (("tandem_tears_total", state.tears), ("tandem_overdue_leases_total", state.overdue)):
            counted.add(name, total - self._seen[name])
            self._seen[name] = total
        if state.condition == PAUSED:
            self._since = self._clock() if self._since is None else self._since
        elif self._since is not None:
            since, self._since = self._since, None
            if state.condition == SERVING:
                counted.observe("tandem_pause_seconds", self._clock() - since)

    def completion(self, outcome: str, count: int) -> None:
        """So many completions are kept, skipped or dropped."""
        self._safely(lambda: self._counted.add("tandem_completions_total", count, outcome))

    def feedback(self, status: int) -> None:
        """A call of /v1/feedback was answered with `status`."""
        code = str(status) if str(status) in CODES else "500"
        self._safely(lambda: self._counted.add("tandem_feedback_requests_total", 1, code))

    @staticmethod
    def _safely(write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception:  # in multiprocess mode they are files: their disk may be full
            logger.exception("tandem: a metric could not be written")


@functools.cache
def of_process() -> ServerMetrics:
    """Those of this process: vLLM may make several applications in one, and a registry takes a metric once."""
    return ServerMetrics()
