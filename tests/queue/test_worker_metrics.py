"""The worker's metrics, scraped over HTTP while a real worker drains a real Redis."""

import json
import logging
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from drain_parts import Weights, say, start
from patience import until
from prometheus_client.parser import text_string_to_metric_families as parsed

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from worker.cli import worker
from worker.consumer.events import JobsRecovered, RedisBack
from worker.consumer.jobs import oldest_job_s, open_queue
from worker.operations.worker_metrics import WorkerMetrics
from worker.orchestrator.reports import CommittedAgain, Live, Lost, Refilled, RolledBack

Samples = dict[str, float]


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=60) as reply:
        text = reply.read().decode()
    return {
        sample.name + (json.dumps(list(sample.labels.values())) if sample.labels else ""): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


@pytest.fixture
def metrics(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerMetrics:
    monkeypatch.setattr("worker.operations.worker_metrics.LOOK_SECONDS", 0.05)
    return WorkerMetrics(redis_url, tmp_path / "run")


def test_what_a_worker_does_is_counted(
    connection: redis.Redis, weights: Weights, producer: Producer, metrics: WorkerMetrics
) -> None:
    for number, text in enumerate(["good", "good", "unpreparable", "not finite"]):
        producer.enqueue(say(text), id=f"t{number}")
    drain = start(connection, weights, hooks=[metrics], max_jobs=3, linger=0)
    with metrics.serving("127.0.0.1", 0) as url:
        drain.work(burst=True)
        found = scrape(url)
    assert found["tandem_versions_total"] == 1
    assert found['tandem_jobs_total["trained"]'] == 2 == found['tandem_jobs_total["failed"]']
    assert found['tandem_trained_jobs_total["demonstration"]'] == 2 and found['tandem_loss["demonstration"]'] == 1.5
    assert found["tandem_tokens_total"] == 20
    assert found["tandem_update_ratio"] == pytest.approx(1e-4)
    for part in ("linger", "tokenize", "step", "commit"):
        assert found[f'tandem_version_seconds_count["{part}"]'] == 1, part
    assert found['tandem_version_seconds_count["pause"]'] == 0, "this step pauses nobody"
    assert found["process_resident_memory_bytes"] > 1e6


def test_kinds_are_told_apart(metrics: WorkerMetrics) -> None:
    kinds = {"liked": {"jobs": 2, "loss": 1.25}, "disliked": {"jobs": 1, "loss": 0.5}}
    line = {"version": 3, "lineage": "a", "jobs": 3, "tokens": 30, "trained_tokens": 12, "loss": 1.0, "kinds": kinds}
    metrics.on_version(line | {"serving_cost_s": 0.25, "pause_s": 0.1, "wait_for_pause_s": 0.02, "journal_s": 0.01})
    metrics.on_already_trained("x", 3)
    metrics.on_split(2, "why")
    with metrics.serving("127.0.0.1", 0) as url:
        found = scrape(url)
    assert found['tandem_trained_jobs_total["liked"]'] == 2 and found['tandem_loss["disliked"]'] == 0.5
    assert 'tandem_loss["demonstration"]' not in found
    assert found["tandem_trained_tokens_total"] == 12 and found["tandem_serving_cost_seconds_total"] == 0.25
    assert found['tandem_version_seconds_sum["wait_for_pause"]'] == 0.02
    assert found['tandem_jobs_total["already_trained"]'] == 1 == found["tandem_splits_total"]


def test_queue_redis_and_disk_are_looked_up(
    connection: redis.Redis, producer: Producer, metrics: WorkerMetrics, tmp_path: Path
) -> None:
    for number in range(3):
        producer.enqueue(say("good"), id=f"t{number}")
    connection.hset(keys.STATE, mapping={"canary_loss": 1.75})
    journal, checkpoints = tmp_path / "state" / "journal", tmp_path / "state" / "checkpoints"
    (checkpoints / "5").mkdir(parents=True)
    (checkpoints / ".6.new").mkdir()
    journal.mkdir()
    (journal / "00000001.journal").write_bytes(b"x" * 1000)
    (checkpoints / "5" / "model.safetensors").write_bytes(b"x" * 3000)
    metrics.began(4, tmp_path / "state")
    with metrics.serving("127.0.0.1", 0) as url:
        until(lambda: "tandem_journal_bytes" in scrape(url), "the first look is over")
        found = scrape(url)
    assert found['tandem_queue_jobs["queued"]'] == 3 and found['tandem_queue_jobs["failed"]'] == 0
    assert 0 <= found["tandem_queue_oldest_job_age_seconds"] < 600 and found["tandem_ledger_transcripts"] == 0
    assert found["tandem_journal_bytes"] == 1000 and found["tandem_checkpoint_bytes"] == 3000
    assert found["tandem_checkpoints"] == 1 and found["tandem_state_free_bytes"] > 0
    assert found["tandem_redis_up"] == 1 and found["tandem_redis_memory_bytes"] > 1e5
    assert found["tandem_redis_evicted_keys_total"] == 0 == found["tandem_redis_may_evict"]
    assert found['tandem_redis_policy["noeviction"]'] == 1
    assert found['tandem_worker_state["none"]'] == 1 == found['tandem_server_state["unreachable"]']
    assert found['tandem_version["header"]'] == 4 and found['tandem_version["redis"]'] == 0
    assert found['tandem_canary_loss["canary"]'] == 1.75 and found["tandem_problems"] == 2
    assert time.time() - 600 < found["tandem_status_timestamp_seconds"] <= time.time()


def test_a_redis_that_may_evict_is_told(connection: redis.Redis, metrics: WorkerMetrics) -> None:
    connection.config_set("maxmemory-policy", "allkeys-lru")
    connection.config_set("maxmemory", 100_000_000)
    try:
        found = metrics.look()
    finally:
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("maxmemory", 0)
    assert found["tandem_redis_may_evict"] == {(): 1} and found["tandem_redis_policy"] == {("allkeys-lru",): 1}
    assert found["tandem_redis_maxmemory_bytes"] == {(): 100_000_000}


def test_a_redis_that_is_away_is_said_to_be_and_nothing_is_guessed(tmp_path: Path) -> None:
    found = WorkerMetrics("redis://127.0.0.1:1/0", tmp_path).look()
    assert found["tandem_redis_up"] == {(): 0}
    assert not [name for name in found if "queue" in name or "worker" in name or name.startswith("tandem_redis_m")]


def test_a_look_that_fails_shows_nothing_and_is_tried_again(
    metrics: WorkerMetrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, Any]:
        raise OSError("no such folder")

    with metrics.serving("127.0.0.1", 0) as url:
        until(lambda: "tandem_redis_up" in scrape(url), "the first look is over")
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "look", broken)
            until(lambda: "tandem_redis_up" not in scrape(url), "what was found is no longer shown")
        until(lambda: "tandem_redis_up" in scrape(url), "the next look is over")
    assert len([record for record in caplog.records if "looking up" in record.message]) == 1


def test_recoveries_are_counted_and_told(metrics: WorkerMetrics) -> None:
    told: list[Any] = []
    tell = metrics.telling(told.append)
    reports = [Lost(True, 3, "a", 4), Lost(False, 0, "b", 4), CommittedAgain(3, 4, 2), Refilled(0, 4, "a", 9)]
    reports += [Live(4, "a"), RolledBack(6, 4, (), 1, 1, 0, 0)]
    for report in reports:
        tell(report)
    metrics.on_notice(JobsRecovered(2))
    metrics.on_notice(RedisBack(1.0, 0))
    assert told == reports and metrics.version == 6
    with metrics.serving("127.0.0.1", 0) as url:
        found = scrape(url)
    counted = {name: value for name, value in found.items() if name.startswith("tandem_recoveries_total")}
    assert set(counted.values()) == {1} and len(counted) == 6 and found["tandem_rollbacks_total"] == 1


def test_the_oldest_job_is_as_old_as_it_says_if_it_can_be_read(connection: redis.Redis, producer: Producer) -> None:
    queue = open_queue(connection)
    assert oldest_job_s(queue) is None
    producer.enqueue(say("good"), id="t0")
    connection.hset("rq:job:t0", "enqueued_at", "2020-01-01T00:00:00.000000Z")
    age = oldest_job_s(queue)
    assert age is not None and age > 1e8
    for wrong in ("yesterday", "", "2020-01-01T00:00:00." + "0" * 1000, b"\xff"):
        connection.hset("rq:job:t0", "enqueued_at", wrong)
        assert oldest_job_s(queue) is None
    connection.hset("rq:job:t0", "enqueued_at", "9999-01-01T00:00:00Z")
    assert oldest_job_s(queue) == 0
    connection.delete("rq:job:t0")
    assert oldest_job_s(queue) is None
    connection.set("rq:job:t0", "no hash")
    assert oldest_job_s(queue) is None


def test_a_taken_port_ends_the_worker_before_it_takes_anything(redis_url: str, tmp_path: Path) -> None:
    with WorkerMetrics(redis_url, tmp_path).serving("127.0.0.1", 0) as url:
        port = url.split(":")[2].split("/")[0]
        asked = ["--redis", redis_url, "--run-dir", str(tmp_path), "--metrics-port", port]
        result = CliRunner().invoke(worker.command, asked)
    assert isinstance(result.exception, TandemError) and f"127.0.0.1:{port}" in str(result.exception)


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_an_address_that_others_reach_is_warned_of(
    host: str, warned: bool, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ["--redis", redis_url, "--run-dir", str(tmp_path), "--metrics-port", "0", "--metrics-host", host]
    with caplog.at_level(logging.INFO):
        result = CliRunner().invoke(worker.command, asked)
    assert isinstance(result.exception, TandemError), "there is no server"
    assert f"metrics: http://{host}:" in caplog.text and ("everybody who reaches" in caplog.text) == warned
