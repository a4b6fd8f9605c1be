"""What the server's /metrics says of the weights, as their state changes."""

import logging

import pytest
from prometheus_client import CollectorRegistry

from worker.serving.vllm.server_metrics import ServerMetrics, of_process
from worker.serving.vllm.server_state import ServerState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Server:
    def __init__(self) -> None:
        self.registry, self.clock = CollectorRegistry(), Clock()
        self.metrics = ServerMetrics(self.registry, self.clock)
        self.state = ServerState("0" * 32, 3)
        self.metrics.watch(self.state)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    @property
    def condition(self) -> str:
        states = ("serving", "paused", "torn", "unreachable")
        (found,) = [state for state in states if self.value("tandem_server_state", state=state)]
        return found


@pytest.fixture
def server() -> Server:
    return Server()


def test_all_is_there_before_anything_happens(server: Server) -> None:
    assert server.condition == "serving" and server.value("tandem_version", source="server") == 3
    assert server.value("tandem_trainer_connected") == server.value("tandem_tears_total") == 0
    assert server.value("tandem_pause_seconds_count") == server.value("tandem_overdue_leases_total") == 0
    assert server.value("tandem_completions_total", outcome="kept") == 0
    assert server.value("tandem_feedback_requests_total", code="202") == 0


def test_a_pause_is_timed_and_brings_the_version(server: Server) -> None:
    server.state.pause()
    assert server.condition == "paused"
    server.clock.now += 0.2
    server.state.take(4)
    server.clock.now += 0.1
    server.state.resume(4)
    assert server.condition == "serving" and server.value("tandem_version", source="server") == 4
    assert server.value("tandem_pause_seconds_count") == 1
    assert server.value("tandem_pause_seconds_sum") == pytest.approx(0.3)


def test_a_tear_is_counted_once_and_is_no_pause(server: Server) -> None:
    server.state.pause()
    server.clock.now += 50
    server.state.lease_overdue()
    server.state.tear("half written")
    server.state.tear("half written still")
    assert server.condition == "torn" and server.value("tandem_tears_total") == 1
    assert server.value("tandem_overdue_leases_total") == 1
    server.clock.now += 600
    server.state.resume(4)
    assert server.condition == "serving" and server.value("tandem_pause_seconds_count") == 0


def test_the_trainer_comes_and_goes(server: Server) -> None:
    server.state.trainer(True)
    assert server.value("tandem_trainer_connected") == 1
    server.state.trainer(False)
    assert server.value("tandem_trainer_connected") == 0


def test_completions_and_feedback_are_counted_by_what_became_of_them(server: Server) -> None:
    server.metrics.completion("kept", 1)
    server.metrics.completion("dropped", 3)
    found = [server.value("tandem_completions_total", outcome=one) for one in ("kept", "skipped", "dropped")]
    assert found == [1, 0, 3]
    for status in (202, 404, 418):
        server.metrics.feedback(status)
    assert [server.value("tandem_feedback_requests_total", code=code) for code in ("202", "404", "500")] == [1, 1, 1]


def test_what_cannot_be_written_is_logged_and_in_nobodys_way(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.serving.vllm.server_metrics.logger", logging.getLogger("seen"))  # vLLM's end at its own
    server.clock.now = "broken"  # type: ignore[assignment]
    server.state.pause()
    server.state.resume(4)  # how long the pause was cannot be said
    assert server.state.condition == "serving" and server.condition == "serving"
    assert "a metric could not be written" in caplog.text


def test_a_process_has_one_set() -> None:
    assert of_process() is of_process()
