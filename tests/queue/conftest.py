"""What the queue's tests share: an empty Redis, and weights that are a file of job ids."""

from pathlib import Path

import pytest
import redis
from drain_parts import Weights


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    """A client of an empty Redis."""
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    """A small real step, in a folder of its own."""
    return Weights(tmp_path)
