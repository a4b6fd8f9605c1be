"""The Redis user of an application that rates answers: the documented rights are enough, the least, and no more."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import redis
from opinion_parts import recorded

from producer import Outcome, Producer, QueueUnavailableError, keys
from producer import jobs as producer_jobs
from producer.opinions import ACL
from worker.testing.redis_server import RedisServer

RULES = re.findall(r"\([^)]*\)|\S+", ACL)


def app_with(store: redis.Redis, server: RedisServer, rules: list[str]) -> str:
    store.execute_command("ACL", "SETUSER", "app", "reset", "on", ">p:/@w", *producer_jobs.ACL.split())
    store.execute_command("ACL", "SETUSER", "app", *rules)
    return f"unix://app:{quote('p:/@w', safe='')}@{urlsplit(server.url).path}?db=0"


@pytest.fixture
def app_url(redis_server: RedisServer, connection: redis.Redis) -> Iterator[str]:
    yield app_with(connection, redis_server, RULES)
    connection.execute_command("ACL", "DELUSER", "app")


def everything(url: str, key: str) -> None:
    """All that feedback does in Redis."""
    with Producer(url) as app:
        assert app.rate(key, 1, user="u1").outcome is Outcome.QUEUED
        assert app.rate(key, 0.5, user="u1").outcome is Outcome.REPLACED
        assert app.rate(key, -0.5, user="u2").outcome is Outcome.WITHDRAWN
        assert app.correct(key, "Better.").outcome is Outcome.QUEUED


def test_the_documented_rights_are_enough(app_url: str, connection: redis.Redis) -> None:
    everything(app_url, recorded(connection).key)


def test_the_documentation_has_these_rights() -> None:
    text = (Path(__file__).parents[2] / "docs" / "feedback.md").read_text()
    begin = text.index("    +getrange")
    assert " ".join(text[begin : text.index("\n\n", begin)].split()) == ACL


@pytest.mark.parametrize("rule", RULES)
def test_every_documented_right_is_needed(redis_server: RedisServer, connection: redis.Redis, rule: str) -> None:
    url = app_with(connection, redis_server, [other for other in RULES if other != rule])
    with pytest.raises(QueueUnavailableError, match=r"no permission|No permissions"):
        everything(url, recorded(connection).key)
    connection.execute_command("ACL", "DELUSER", "app")


@pytest.mark.parametrize(
    "command",
    [
        "SET completion:@key x", "DEL completion:@key", "EXPIRE completion:@key 1", "ZRANGE completions:index 0 -1",
        "GET completions:index", "KEYS completion:*", "SCAN 0", "HGETALL feedback:users", "HGET feedback:users a",
        "DEL feedback:said:@key", "DEL feedback:users", "LPOP rq:queue:feedback", "LREM rq:queue:other 0 a",
        "DEL rq:queue:feedback", "DEL weights:ledger", "DEL rq:results:a", "SET weights:version 9", "EVAL return{} 0",
    ],
)  # fmt: skip
def test_the_documented_rights_are_no_more(app_url: str, connection: redis.Redis, command: str) -> None:
    key = recorded(connection).key
    with redis.Redis.from_url(app_url) as app, pytest.raises(redis.exceptions.NoPermissionError):
        app.execute_command(*command.replace("@key", key).split())


def test_missing_rights_are_named(redis_server: RedisServer, connection: redis.Redis) -> None:
    url = app_with(connection, redis_server, [])
    with Producer(url) as app, pytest.raises(QueueUnavailableError, match=r"'getrange'.*producer\.opinions\.ACL"):
        app.rate(recorded(connection).key, 1)
    assert connection.llen(f"rq:queue:{keys.QUEUE}") == 0
    connection.execute_command("ACL", "DELUSER", "app")
