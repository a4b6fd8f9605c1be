"""What the queue's tests share: an empty Redis, and weights that are a file of job ids."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from drain_parts import Weights

from producer import Producer
from producer.eviction import Eviction
from worker.versions.eviction_watch import publish


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    """A client of an empty Redis."""
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """A small real step, in a folder of its own."""
    return Weights(tmp_path)


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """The Redis of `redis_url`, of which a worker has published that it evicts nothing."""
    client = redis.Redis.from_url(redis_url)
    publish(client, Eviction("noeviction", 0))
    yield client
    client.close()


@pytest.fixture
def producer(redis_url: str) -> Iterator[Producer]:
    """Of an application, at an empty Redis."""
    with Producer(redis_url) as made:
        yield made
