"""URLs and servers: each works, or is one sentence before anything is queued."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from redis_kinds import Kinds, has_ipv6, redis_kinds, tls_front

from producer import AsyncProducer, Producer, TandemError
from producer.connection import checked_url, safe_url
from producer.errors import QueueUnavailableError, RedisUrlError, WaitTimeoutError

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody you know."}]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kinds]:
    with redis_kinds(tmp_path_factory.mktemp("kinds")) as started:
        yield started


@pytest.fixture
def empty(kinds: Kinds) -> Iterator[redis.Redis]:
    """The primary, emptied."""
    with redis.Redis(port=kinds.primary) as client:
        client.flushall()
        yield client


def sync_enqueue(url: str) -> Any:
    with Producer(url) as producer:
        return producer.enqueue_many([{"id": "a", "messages": TALK}, {"id": "b", "messages": TALK}])


def async_enqueue(url: str) -> Any:
    async def run() -> Any:
        async with AsyncProducer(url) as producer:
            return await producer.enqueue_many([{"id": "a", "messages": TALK}, {"id": "b", "messages": TALK}])

    return asyncio.run(run())


both_clients = pytest.mark.parametrize("enqueue", [sync_enqueue, async_enqueue])


def sentence(error: BaseException) -> str:
    said = str(error)
    assert "\n" not in said and len(said) < 400 and "hunter" not in said
    return said


@pytest.mark.parametrize(
    "options",
    [
        "decode_responses=True", "decode_responses=yes&encoding=utf-16", "encoding_errors=ignore", "protocol=2",
        "protocol=3", "protocol=3&legacy_responses=false", "socket_timeout=2", "socket_timeout=0.5&db=0",
        "socket_connect_timeout=1.5", "health_check_interval=1", "client_name=app", "max_connections=4",
        "retry_on_timeout=true", "socket_keepalive=yes", "username=default&password=",
    ],
)  # fmt: skip
@both_clients
def test_options_that_work(enqueue: Callable[[str], Any], options: str, kinds: Kinds, empty: redis.Redis) -> None:
    url = f"redis://127.0.0.1:{kinds.primary}?{options}"
    assert [sent.new for sent in enqueue(url)] == [True, True]
    assert empty.llen("rq:queue:feedback") == 2
    empty.hset("weights:ledger", "c", 3)
    with Producer(url) as producer:
        assert producer.status("a").state == "queued" and producer.wait("c", timeout=0) == 3
        assert producer.job("a") is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("timeout=3", "option timeout is for connection pools; use socket_timeout"),
        ("ssl_cert_reqs=none", "ssl_cert_reqs needs TLS: begin the URL with rediss://"),
        ("ssl=true", "ssl needs TLS"),
        ("nonsense=hunter2", "option nonsense is not known; remove it"),
        ("connection_class=hunter2", "connection_class is not known"),
        ("host=10.0.0.1", "option host is not known"),
        ("socket_timeout=0", "socket_timeout must be a number of seconds above 0"),
        ("socket_timeout=-1", "socket_timeout must be"),
        ("socket_timeout=hunter2", "socket_timeout must be"),
        ("socket_timeout=nan", "socket_timeout must be"),
        ("socket_connect_timeout=0", "socket_connect_timeout must be"),
        ("db=hunter2", "not a Redis URL"),
        ("hunter2", "an option is not known"),
        ("p=x@hunter2", "percent-encoded"),
    ],
)
@both_clients
def test_options_that_cannot_work_are_one_sentence(
    enqueue: Callable[[str], Any], options: str, says: str, kinds: Kinds, empty: redis.Redis
) -> None:
    with pytest.raises(RedisUrlError) as caught:
        enqueue(f"redis://127.0.0.1:{kinds.primary}?{options}")
    assert says in sentence(caught.value)
    assert empty.dbsize() == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("rediss://127.0.0.1?ssl_cert_reqs=hunter2", "refuses the URL's options"),
        ("rediss://127.0.0.1?ssl_hunter=1", "refuses the URL's options"),
        ("redis+sentinel://:hunter2@h/main", "not through Sentinel"),
        ("rediss+cluster://:hunter2@h", "not through Sentinel or to a Cluster"),
        ("redis://:#hunter2@h/0", "percent-encoded"),
        ("redis://[::1/0", "not a Redis URL: the given URL"),
        ("unix://", "not a Redis URL"),
        ("redis://h/0/0", "not a Redis URL"),
    ],
)
def test_urls_that_cannot_work_are_one_sentence(url: str, says: str) -> None:
    for make in (Producer, AsyncProducer):
        with pytest.raises(RedisUrlError) as caught:
            make(url)
        assert says in sentence(caught.value)


def test_a_sleep_is_shorter_than_the_sockets_timeout(kinds: Kinds, empty: redis.Redis) -> None:
    with Producer(f"redis://127.0.0.1:{kinds.primary}?socket_timeout=2") as producer:
        producer.enqueue(TALK, id="a")
        with pytest.raises(WaitTimeoutError):  # not QueueUnavailableError: no read was cut off
            producer.wait("a", timeout=3)


@both_clients
def test_tls(enqueue: Callable[[str], Any], kinds: Kinds, empty: redis.Redis, tmp_path: Path) -> None:
    with tls_front(kinds.primary, tmp_path) as (port, certificate):
        with pytest.raises(QueueUnavailableError) as caught:
            enqueue(f"rediss://localhost:{port}")
        assert "certificate verify failed" in sentence(caught.value) and empty.dbsize() == 0
        assert len(enqueue(f"rediss://localhost:{port}?ssl_ca_certs={quote(str(certificate))}")) == 2
        found = enqueue(f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none&ssl_check_hostname=false&decode_responses=1")
        assert [sent.outcome for sent in found] == ["known", "known"]


def test_more_calls_at_a_time_than_redis_py_has_connections_by_default(kinds: Kinds, empty: redis.Redis) -> None:
    async def many() -> None:
        async with AsyncProducer(f"redis://127.0.0.1:{kinds.primary}") as producer:
            await asyncio.gather(*(producer.enqueue(TALK) for _ in range(120)))

    asyncio.run(many())
    assert empty.llen("rq:queue:feedback") == 120


def test_all_connections_taken_is_not_a_redis_that_is_away(kinds: Kinds, empty: redis.Redis) -> None:
    with Producer(f"redis://127.0.0.1:{kinds.primary}?max_connections=1") as producer:
        producer.enqueue(TALK, id="a")
        taken = producer._redis.connection_pool.get_connection()
        with pytest.raises(QueueUnavailableError) as caught:
            producer.enqueue(TALK)
        producer._redis.connection_pool.release(taken)
    assert "the URL's max_connections are all in use; raise it" in sentence(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://app:hunter2@[::1]:7/3?password=hunter2", "redis://[::1]:7/3"),
        ("redis://[::1]", "redis://[::1]"),
        ("redis://", "redis://localhost"),
        ("redis:///3", "redis://localhost/3"),
        ("rediss://:hunter2@H:1", "rediss://h:1"),
        ("unix://:hunter2@/run/redis.sock?db=1", "unix:///run/redis.sock"),
    ],
)
def test_a_url_as_it_may_be_printed(url: str, shown: str) -> None:
    assert safe_url(url) == shown
    assert safe_url(checked_url(url)) == shown


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@both_clients
def test_a_host_of_ipv6(enqueue: Callable[[str], Any], kinds: Kinds, empty: redis.Redis) -> None:
    assert len(enqueue(f"redis://[::1]:{kinds.primary}/0")) == 2
    assert empty.llen("rq:queue:feedback") == 2


@both_clients
def test_a_replica_is_named_and_gets_nothing(enqueue: Callable[[str], Any], kinds: Kinds, empty: redis.Redis) -> None:
    url = f"redis://127.0.0.1:{kinds.replica}"
    with pytest.raises(QueueUnavailableError) as caught:
        enqueue(url)
    assert (
        sentence(caught.value)
        == f"Redis at {url} is a read-only replica and queues nothing; give the URL of its primary"
    )
    assert empty.dbsize() == 0
    with Producer(url) as producer:
        assert producer.version() == 0, "what only reads works on a replica"


@pytest.mark.parametrize("database", ["", "/2"])
@both_clients
def test_a_node_of_a_cluster_is_named_and_gets_nothing(
    enqueue: Callable[[str], Any], database: str, kinds: Kinds
) -> None:
    with pytest.raises(QueueUnavailableError) as caught:
        enqueue(f"redis://127.0.0.1:{kinds.cluster}{database}")
    assert "part of a Redis Cluster, on which neither RQ nor Tandem runs" in sentence(caught.value)
    with redis.Redis(port=kinds.cluster) as node:
        assert node.dbsize() == 0


@both_clients
def test_a_sentinel_is_named(enqueue: Callable[[str], Any], kinds: Kinds) -> None:
    with pytest.raises(QueueUnavailableError) as caught:
        enqueue(f"redis://127.0.0.1:{kinds.sentinel}")
    assert "it is a Sentinel or a proxy; give the URL of the Redis itself" in sentence(caught.value)


@both_clients
def test_a_full_redis_is_named_and_queues_whole_jobs_only(
    enqueue: Callable[[str], Any], kinds: Kinds, empty: redis.Redis
) -> None:
    empty.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailableError) as caught:
            enqueue(f"redis://127.0.0.1:{kinds.primary}")
    finally:
        empty.config_set("maxmemory", 0)
    assert "is full and queues nothing; raise its maxmemory" in sentence(caught.value)
    assert empty.dbsize() == 0


def test_every_refused_url_is_an_error_of_tandem() -> None:
    assert issubclass(RedisUrlError, TandemError)
