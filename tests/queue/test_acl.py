"""The Redis user of a producer: the documented rights are enough, the least, and no more."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

import pytest
import redis
from patience import PATIENCE
from producer_parts import TALK, fail, once_blocked, train

from producer import (
    AsyncProducer,
    Producer,
    QueueUnavailableError,
    WaitTimeoutError,
)
from producer.jobs import ACL
from worker.testing.redis_server import RedisServer


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


def idle(app: Producer) -> None:
    """As after more seconds without a command than its health_check_interval: the next one is preceded by a PING."""
    for connection in app._redis.connection_pool._available_connections:
        connection.next_health_check = 0.0


@pytest.fixture
def app_url(redis_server: RedisServer, store: redis.Redis) -> Iterator[str]:
    """A user with the documented rights. A Redis older than 7 refuses them: the tests fail then, and never skip."""
    store.execute_command("ACL", "SETUSER", "app", "reset", "on", ">p:/@w", *ACL.split())
    yield f"unix://app:{quote('p:/@w', safe='')}@{urlsplit(redis_server.url).path}?db=0"
    store.execute_command("ACL", "DELUSER", "app")


def test_the_documented_rights_are_enough_for_the_options_of_a_url(app_url: str) -> None:
    with Producer(f"{app_url}&health_check_interval=1&client_name=app") as app:
        assert app.enqueue(TALK).new
        idle(app)
        assert app.enqueue(TALK).new


def test_the_documented_rights_are_enough(app_url: str, store: redis.Redis) -> None:
    with Producer(app_url) as app:
        assert app.enqueue(TALK, id="a").new
        assert app.enqueue(TALK, id="a").job is not None
        assert len(app.enqueue_many([{"id": "b", "messages": TALK}] * 2)) == 2
        thread = once_blocked(store, lambda: train(store, "a", 1))
        assert app.wait("a", timeout=PATIENCE) == 1
        thread.join()
        fail(store, "b", "no")
        assert (app.status("b").reason, app.version()) == ("no", 1)
        assert app.enqueue(TALK, id="a").version == 1

    async def everything() -> None:
        async with AsyncProducer(app_url) as app:
            assert (await app.enqueue(TALK, id="c")).new
            assert not (await app.enqueue(TALK, id="c")).new
            assert await app.wait("a") == 1

    asyncio.run(everything())


@pytest.mark.parametrize("right", [rule[1:] for rule in ACL.split() if rule.startswith("+")])
def test_every_documented_right_is_needed(app_url: str, store: redis.Redis, right: str) -> None:
    """The rights are the least: without any one of them something that a producer does is refused."""
    rules = [rule for rule in ACL.split() if rule != f"+{right}"]
    store.execute_command("ACL", "SETUSER", "app", "reset", "on", ">p:/@w", *rules)
    with (
        Producer(f"{app_url}&health_check_interval=1&client_name=app") as app,
        pytest.raises(QueueUnavailableError, match=rf"'{re.escape(right)}'|no permission|EXEC without MULTI") as caught,
    ):
        app.enqueue(TALK, id="a")
        idle(app)
        app.enqueue(TALK, id="a")
        assert app.job("a") is not None
        assert app.version() == 0
        assert app.status("a").state == "queued"
        with contextlib.suppress(WaitTimeoutError):
            app.wait("a", timeout=0.2)
    said = f"{caught.value} {caught.value.__cause__}"
    assert "rq:job" not in said, "the command that was refused has the transcript in it"


@pytest.mark.parametrize(
    "command",
    [
        "SET weights:version 9", "HSET weights:ledger a 9", "HSET weights:state a 9", "HDEL weights:ledger a",
        "XADD weights:events * a b", "DEL rq:job:a", "LPOP rq:queue:feedback", "LPUSH rq:queue:feedback a",
        "RPUSH rq:queue:other a", "RPUSH rq:queue:default a", "RPUSH rq:job:a b", "SADD rq:queues rq:queue:default",
        "SADD rq:job:a:dependents evil", "HSET rq:queue:feedback a b", "HSET rq:results:a a b", "HGETALL rq:worker:w",
        "PUBLISH rq:pubsub:x y", "CONFIG GET *", "INFO", "KEYS *", "FLUSHALL", "ACL LIST", "CLIENT LIST", "SHUTDOWN",
        "EVAL return{} 0", "EVALSHA ffffffffffffffffffffffffffffffffffffffff 0", "FUNCTION LIST", "EXPIRE rq:job:a 1",
    ],
)  # fmt: skip
def test_the_documented_rights_are_no_more(app_url: str, command: str) -> None:
    with redis.Redis.from_url(app_url) as app, pytest.raises(redis.exceptions.NoPermissionError):
        app.execute_command(*command.split())


def test_a_producer_cannot_load_a_script_that_never_ends(app_url: str, store: redis.Redis) -> None:
    with redis.Redis.from_url(app_url) as app, pytest.raises(redis.exceptions.NoPermissionError):
        app.script_load("while true do end")
    assert store.ping()


def test_missing_rights_are_named(app_url: str, store: redis.Redis) -> None:
    store.execute_command("ACL", "SETUSER", "app", "-get")
    with Producer(app_url) as app, pytest.raises(QueueUnavailableError, match=r"'get'.*producer\.jobs\.ACL"):
        app.version()
