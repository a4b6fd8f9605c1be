"""The Redis user of a worker: the documented rights are enough, and `tandem doctor` names each that is missing."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from drain_parts import Weights, start

from producer import Producer, keys
from worker.operations.doctor.redis_rights import PRODUCER, WORKER, WORKER_ACL, missing
from worker.testing.redis_server import RedisServer

DOCS = Path(__file__).parents[2] / "docs" / "redis.md"


@pytest.fixture
def worker(redis_server: RedisServer, connection: redis.Redis) -> Iterator[redis.Redis]:
    """A client of a user with the documented rights."""
    set_rights(connection, WORKER_ACL)
    connection.acl_log_reset()  # the server is the session's: other tests' refusals are in its log
    with redis.Redis.from_url(f"unix://worker:pw@{urlsplit(redis_server.url).path}?db=0") as client:
        yield client
    connection.execute_command("ACL", "DELUSER", "worker")


def set_rights(connection: redis.Redis, rules: str) -> None:
    connection.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">pw", *rules.split())


def test_the_documented_rights_are_enough(
    worker: redis.Redis, connection: redis.Redis, producer: Producer, weights: Weights
) -> None:
    """One is trained, one is refused by the step, one cannot be prepared."""
    for name, says in (("a", "good"), ("b", "not finite"), ("c", "unpreparable")):
        producer.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": says}], id=name)
    start(worker, weights, hooks=[]).work(burst=True)
    assert connection.hgetall(keys.LEDGER) == {b"a": b"1"}
    assert [producer.status(name).state for name in "abc"] == ["finished", "failed", "failed"]
    assert connection.acl_log() == []


def test_the_documentation_has_them() -> None:
    text = " ".join(DOCS.read_text().split())
    assert f"ACL SETUSER worker on >PASSWORD {WORKER_ACL}" in text


def test_nothing_is_missing_and_nothing_is_changed(worker: redis.Redis, connection: redis.Redis) -> None:
    assert missing(worker, WORKER) == missing(worker, PRODUCER) == missing(connection, WORKER) == []
    assert connection.dbsize() == 0


def test_a_connection_that_is_due_for_its_health_check_changes_nothing(redis_url: str, connection: redis.Redis) -> None:
    """As with health_check_interval in the URL, and a slow Redis."""
    with redis.Redis.from_url(redis_url, health_check_interval=1e-9) as client:
        assert missing(client, WORKER) == []
    assert connection.dbsize() == 0


@pytest.mark.parametrize("command", sorted({command[0] for command in [*WORKER, *PRODUCER]}))
def test_a_command_that_is_missing_is_named(worker: redis.Redis, connection: redis.Redis, command: str) -> None:
    set_rights(connection, f"{WORKER_ACL} -{command}")
    named = missing(worker, [*WORKER, *PRODUCER])
    assert named and all(name.partition(" ")[0] == command for name in named)


@pytest.mark.parametrize("keys_", ["~rq:*", "~weights:*"])
def test_keys_that_are_missing_are_named(worker: redis.Redis, connection: redis.Redis, keys_: str) -> None:
    set_rights(connection, WORKER_ACL.replace(keys_, ""))
    named = missing(worker, WORKER)
    assert named and f"hset {'rq:job:doctor' if 'rq' in keys_ else keys.LEDGER}" in named


@pytest.mark.parametrize("command", ["multi", "watch"])
def test_without_transactions_nothing_is_tried(worker: redis.Redis, connection: redis.Redis, command: str) -> None:
    """What follows would run at once."""
    set_rights(connection, f"{WORKER_ACL} -{command}")
    assert [name.partition(" ")[0] for name in missing(worker, WORKER)] == [command]
    assert connection.dbsize() == 0
