"""Session fixtures: real servers, started once. Nothing here stands in for a part a user has."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from hypothesis import settings

from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # server, trainer and tests share few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")


settings.register_profile("untimed", deadline=None)  # these machines are noisy: no test may fail for being slow
settings.load_profile("untimed")

GPU = torch.cuda.is_available()
SERVER_OPTIONS = ["--max-model-len", "2048", "--max-num-seqs", "8"]
if GPU:
    # vLLM 0.26 serves the text model of a multi-modal checkpoint only, and needs to be told which kernels to use. With
    # its cache's size said, it does not measure free memory, which other tests beside it change.
    SERVER_OPTIONS += ["--language-model-only", "--gdn-prefill-backend", "triton", "--enable-prefix-caching"]
    SERVER_OPTIONS += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", "2000000000"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the end to end tests train, and in the end stop, the session's server: they come last."""
    if GPU:
        items.sort(key=lambda item: item.path.name == "test_end_to_end.py")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis with Tandem's settings, for the whole session."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The URL of an empty database on it."""
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    yield redis_server.url
    client.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly initialised tiny Qwen3.5 directory."""
    from worker.testing.tiny_model import make_tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(folder, vision=GPU, real_heads=GPU)  # a GPU's kernels are chosen by the heads
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real vLLM serving the tiny model, for tests that leave it as they found it."""
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("run"), extra=SERVER_OPTIONS) as running:
        yield running
