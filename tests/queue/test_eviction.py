"""A Redis that evicts, loses jobs or is of the wrong kind: the worker publishes it, everybody says so from there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from drain_parts import Lines, Weights, start
from patience import PATIENCE
from redis_kinds import Kinds, redis_kinds

from producer import Eviction, Producer, State, TandemError, TranscriptFailedError, keys
from worker.cli.status import line
from worker.operations.status import gather
from worker.versions import lost_jobs
from worker.versions.eviction_watch import EvictionWatch, check_kind, publish

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    before = {name: client.config_get(name)[name] for name in ("maxmemory", "maxmemory-policy")}
    yield client
    for name, value in before.items():
        client.config_set(name, value)
    client.close()


def evicting(connection: redis.Redis, policy: str = "allkeys-lru", limit: int = 10**9) -> None:
    connection.config_set("maxmemory-policy", policy)
    connection.config_set("maxmemory", limit)


def looked_at(redis_url: str, folder: Path) -> dict[str, Any]:
    return gather(redis_url, folder)


def test_the_worker_publishes_the_policy_and_everybody_reads_it(
    redis_url: str, connection: redis.Redis, tmp_path: Path
) -> None:
    producer = Producer(redis_url)
    assert producer.eviction() == Eviction() and str(producer.eviction()) == "unknown"
    producer.enqueue(GOOD, id="a")
    evicting(connection)
    lines = Lines()
    start(connection, Weights(tmp_path), hooks=[lines], linger=0).work(burst=True)
    assert producer.eviction() == Eviction("allkeys-lru", 10**9) and producer.eviction().loses_jobs
    (said,) = [notice for notice in lines.notices if "evicts" in notice]
    assert "(maxmemory-policy allkeys-lru)" in said and "set maxmemory-policy noeviction" in said
    evicting(connection, "noeviction")
    lines.notices.clear()
    start(connection, Weights(tmp_path), hooks=[lines], linger=0).work(burst=True)
    assert producer.eviction() == Eviction("noeviction", 10**9) and producer.eviction().problem is None
    assert not lines.notices


def test_a_policy_that_changes_is_published_again_but_redis_is_not_asked_each_time(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    watch = EvictionWatch(connection, told.append)
    watch.look()
    evicting(connection, "volatile-ttl")
    watch.look()
    assert connection.hget(keys.STATE, "maxmemory_policy") == b"noeviction" and not told
    monkeypatch.setattr("worker.versions.eviction_watch.LOOK_SECONDS", 0.0)
    watch = EvictionWatch(connection, told.append)
    watch.look()
    evicting(connection, "allkeys-random")
    watch.look()
    watch.look()
    assert connection.hget(keys.STATE, "maxmemory_policy") == b"allkeys-random"
    assert len(told) == 2 and "volatile-ttl" in told[0] and "allkeys-random" in told[1]


def test_a_worker_that_may_not_ask_says_unknown(connection: redis.Redis, redis_url: str) -> None:
    connection.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+@all", "-info")
    try:
        connection.hset(keys.STATE, "maxmemory_policy", "noeviction")
        with redis.Redis.from_url(redis_url.replace("unix://:", "unix://w:").replace(_password(redis_url), "p")) as w:
            EvictionWatch(w, pytest.fail).look()
            check_kind(w, "x")
    finally:
        connection.execute_command("ACL", "DELUSER", "w")
    assert Producer(redis_url).eviction() == Eviction()


def _password(url: str) -> str:
    return url.partition("://:")[2].partition("@")[0]


def test_status_says_the_policy_and_that_it_loses_jobs(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    evicting(connection)
    found = looked_at(redis_url, tmp_path)
    assert " · eviction allkeys-lru · " in line(found)
    assert any("allkeys-lru" in problem and "queued transcripts" in problem for problem in found["problems"])
    evicting(connection, limit=0)
    found = looked_at(redis_url, tmp_path)
    assert "eviction allkeys-lru (no memory limit)" in line(found)
    assert not any("allkeys-lru" in problem for problem in found["problems"])


def test_status_reads_the_published_policy_where_it_may_not_ask(redis_url: str, connection: redis.Redis) -> None:
    """As the operator's URL of a hosted Redis, which has no INFO."""
    publish(connection, Eviction("volatile-lru", 5))
    connection.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+@all", "-info")
    try:
        url = redis_url.replace("unix://:", "unix://w:").replace(_password(redis_url), "p")
        found = looked_at(url, Path("/nowhere"))
        connection.delete(keys.STATE)
        later = looked_at(url, Path("/nowhere"))
    finally:
        connection.execute_command("ACL", "DELUSER", "w")
    assert found["eviction"]["policy"] == "volatile-lru" and "volatile-lru" in str(found["problems"])
    assert "eviction unknown" in line(later)


def test_an_evicted_job_is_reported_by_its_id(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    producer = Producer(redis_url)
    long_id = "l" * 128
    for id in ("a", "b", long_id):
        producer.enqueue(GOOD, id=id)
    connection.delete("rq:job:b", f"rq:job:{long_id}")  # what an eviction does
    found = looked_at(redis_url, tmp_path)
    assert found["lost"] == ["b", long_id] and "3 queued, 0 in hand, 0 failed, 2 lost" in line(found)
    start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
    assert producer.status("a").version == 1
    assert [producer.status(id).state for id in ("b", long_id)] == [State.LOST] * 2
    with pytest.raises(TranscriptFailedError, match="transcript b is lost"):
        producer.wait("b", timeout=PATIENCE)
    found = looked_at(redis_url, tmp_path)
    assert found["lost"] == ["b", long_id]
    assert any(f"2 queued transcripts have no job in Redis: evicted, or deleted; queue them again: b, {long_id}" in p
               for p in found["problems"])  # fmt: skip
    assert producer.enqueue(GOOD, id="b").new
    assert looked_at(redis_url, tmp_path)["lost"] == [long_id]
    start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
    assert (producer.wait("b", timeout=0), looked_at(redis_url, tmp_path)["lost"]) == (2, [long_id])


def test_of_many_lost_ids_status_tells_the_number_and_the_first(
    redis_url: str, connection: redis.Redis, tmp_path: Path
) -> None:
    ids = [f"x{i:03}" for i in range(230)]
    connection.rpush(f"rq:queue:{keys.QUEUE}", *ids)
    found = looked_at(redis_url, tmp_path)
    assert found["lost"] == ids[:100] and found["lost_count"] == 230 and ", 230 lost" in line(found)
    assert any("230 queued transcripts" in said and "225 more (--json lists 100 of them)" in said
               for said in found["problems"])  # fmt: skip


def test_what_somebody_planted_in_redis_is_read_within_bounds(
    redis_url: str, connection: redis.Redis, tmp_path: Path
) -> None:
    connection.hset(keys.STATE, mapping={"lineage": "a" * 32, "loss": "1.5", "canary_losses": '{"a": 1}'})
    connection.hset(keys.STATE, mapping={f"of-somebody-else-{i}": "x" * 1000 for i in range(2000)})
    connection.hset(keys.LOST, mapping={f"l{i}": "2099-01-01T00:00:00Z" for i in range(30_000)})
    before = connection.info("stats")["total_net_output_bytes"]
    found = looked_at(redis_url, tmp_path)
    assert connection.info("stats")["total_net_output_bytes"] - before < 1_500_000
    assert found["canary"] == {"a": 1.0} and 9_000 <= found["lost_count"] <= 10_000 and len(found["lost"]) == 100
    connection.hset(keys.STATE, "hold", "x" * 100_000)
    assert looked_at(redis_url, tmp_path)["hold"] == "the reason is too long to be shown"


def test_a_trained_id_is_not_lost_and_the_memory_is_bounded(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_jobs, "KEPT", 3)
    connection.hset(keys.LEDGER, "a", 1)
    lost_jobs.record(connection, ["a", "b", "c"])
    assert lost_jobs.since(connection, 1) == ["b", "c"]
    lost_jobs.record(connection, ["d"])
    assert lost_jobs.since(connection, 1) == ["b", "c", "d"]
    lost_jobs.record(connection, ["e"])
    assert lost_jobs.since(connection, 1) == ["e"]
    lost_jobs.record(connection, [f"x{i}" for i in range(9)])
    assert connection.hlen(keys.LOST) == 3
    connection.hset(keys.LOST, mapping={"old": "2020-01-01T00:00:00Z", "odd": b"\xff"})
    assert lost_jobs.since(connection, 1) == ["x0", "x1", "x2"]


def test_status_says_that_training_is_on_hold(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    connection.hset(keys.STATE, mapping={"hold": "the canary set's loss rose"})
    found = looked_at(redis_url, tmp_path)
    assert "worker none (paused)" in line(found)
    assert "training is paused: the canary set's loss rose; `tandem resume` ends it" in found["problems"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kinds]:
    with redis_kinds(tmp_path_factory.mktemp("kinds")) as started:
        yield started


@pytest.mark.parametrize(
    ("kind", "says"),
    [("replica", "is a read-only replica"), ("cluster", "part of a Redis Cluster"), ("sentinel", "is a Sentinel")],
)
def test_the_worker_refuses_other_kinds_of_servers_before_it_touches_anything(
    kind: str, says: str, kinds: Kinds, tmp_path: Path
) -> None:
    from worker.cli import worker

    url = f"redis://127.0.0.1:{getattr(kinds, kind)}"
    result = CliRunner().invoke(worker.command, ["--redis", url, "--run-dir", str(tmp_path / "no-server")])
    assert isinstance(result.exception, TandemError) and says in str(result.exception)
    found = looked_at(url, tmp_path)
    assert "\n" not in line(found)
    if kind == "replica":
        assert found["version"] == 0, "what only reads works"
    else:
        assert any(says.split()[-1] in problem for problem in found["problems"])
