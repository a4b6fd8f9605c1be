"""A Redis that is away for longer than a step waits: the worker puts its jobs back, blames none, and goes on later."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from drain_parts import Lines, Ready, Weights, job, say, start

from producer import keys
from producer.client import Producer
from producer.errors import QueueUnavailableError
from worker.cli import worker as worker_command
from worker.config.protocol import UnavailableError, Update
from worker.operations.worker_metrics import WorkerMetrics
from worker.orchestrator import agreement
from worker.testing.redis_server import RedisServer


class Asks(Weights):
    """The small step, which asks Redis before each version as `LiveUpdate` does."""

    def __init__(self, folder: Path, connection: redis.Redis) -> None:
        super().__init__(folder)
        self.connection = connection

    def run(self, prepared: Sequence[Ready]) -> Update:
        session: Any = SimpleNamespace(weights=SimpleNamespace(header=SimpleNamespace(fields=lambda: self.header)))
        agreement.confirm(self.connection, session)
        return super().run(prepared)


class Dies(Asks):
    """Redis dies just before the first version, and comes back when the step has given up."""

    def __init__(self, folder: Path, connection: redis.Redis, server: RedisServer) -> None:
        super().__init__(folder, connection)
        self.server = server
        self.deaths = 0

    def run(self, prepared: Sequence[Ready]) -> Update:
        if self.deaths:
            return super().run(prepared)
        self.deaths += 1
        self.server.stop()
        try:
            return super().run(prepared)
        finally:
            self.server.start()


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_redis_that_is_away_for_long_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(agreement, "REDIS_SECONDS", 0.0)
    with RedisServer(tmp_path / "redis") as server:
        producer, lines = Producer(server.url), Lines()
        ids = [producer.enqueue(say("good"), id=f"t{i}").id for i in range(jobs)]
        connection = redis.Redis.from_url(server.url)
        weights = Dies(tmp_path, connection, server)
        start(connection, weights, hooks=[lines], linger=0.0).work(burst=True)
        assert sorted(weights.trained) == sorted(ids) and not lines.rejected
        assert any("Redis serves this worker again" in said for said in lines.notices)
        assert {job(connection, id).retries_left for id in ids} == {keys.MAX_RETRIES}, "no retry was spent"


def test_a_redis_that_refuses_for_good_ends_the_worker_with_a_sentence(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "REDIS_SECONDS", 0.0)
    connection = redis.Redis.from_url(redis_url)
    Producer(redis_url).enqueue(say("good"), id="a")
    weights = Asks(tmp_path, connection)
    worker = start(connection, weights, hooks=[], linger=0.0)
    connection.delete(keys.VERSION)
    connection.lpush(keys.VERSION, "of a wrong type")
    with pytest.raises(UnavailableError, match="Redis refuses to say at which version it is"):
        worker.work(burst=True)
    assert Producer(redis_url).status("a").state == "queued"


def test_a_redis_that_goes_away_during_a_start_is_one_sentence(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:

        @contextmanager
        def opening(**_: Any) -> Iterator[Any]:
            server.stop()
            yield None

        starting = worker_command._ready("w", WorkerMetrics(server.url, tmp_path), ("127.0.0.1", None), opening, False)
        with pytest.raises(QueueUnavailableError, match=r"cannot reach Redis at unix://.*start it, or set REDIS_URL"):
            starting.__enter__()


def test_a_redis_that_refuses_a_command_ends_the_worker_without_quoting_it(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_command, "agree", lambda *_, **__: None)
    weights = SimpleNamespace(header=SimpleNamespace(version=0))
    session: Any = SimpleNamespace(weights=weights, manager=SimpleNamespace(folder=tmp_path))
    shown_at = ("127.0.0.1", None)
    starting = worker_command._ready(
        "w", WorkerMetrics(redis_url, tmp_path), shown_at, lambda **_: nullcontext(session), False
    )
    refusal = pytest.raises(QueueUnavailableError, match="answered with an error: WRONGTYPE")
    with refusal as refused, starting as (connection, _, _), connection.pipeline() as pipe:
        connection.set("taken", "by text")
        pipe.hset("taken", "data", "a secret")
        pipe.execute()
    assert "secret" not in str(refused.value) and "secret" not in str(refused.value.__cause__)
