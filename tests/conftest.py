"""Session fixtures: real servers, started once. Nothing here stands in for a part a user has."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings
from server_options import FEEDBACK_KEY, FEEDBACK_OPTIONS, GPU, MULTI_MODAL, SERVER_OPTIONS
from tqdm import tqdm

from worker.testing.redis_server import RedisServer
from worker.testing.server_process import ServerProcess
from worker.utils import torch_setup

os.environ.setdefault("OMP_NUM_THREADS", "1")  # server, trainer and tests share few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # vLLM would bind the servers of all processes to the same CPU
    _cpus = sorted(os.sched_getaffinity(0))
    _own = _cpus[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_cpus)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_own))
os.environ["TANDEM_PROGRESS"] = "off"  # how far work is, is said after two seconds: on a busy machine, in any test
tqdm.monitor_interval = 0  # its thread lives as long as the process: whichever test ran first would fail for it


# No deadlines: machines are noisy, and no test may fail for being slow. A commit passes or fails, always: the examples
# are the same in every run. `-m slow` draws new ones, and more.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None, max_examples=1000, print_blob=True)

HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Of this process and of those that tests start, as on a terminal. A shell that starts a suite in the background has it
ignore SIGINT instead."""
for _number, _handler in HANDLERS.items():
    signal.signal(_number, _handler)
THREAD_SECONDS = 120.0
"""How long a thread of a test may take to end after the test, on a machine that is busy."""


SERVER = "server/"
LONGEST = (SERVER, "end_to_end/test_end_to_end.py", "chaos/", "end_to_end/")
"""Of the tests' ids: what comes first."""


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("new" if _slow(config) else "same")


def _slow(config: pytest.Config) -> bool:
    return str(config.getoption("-m")).strip() == "slow"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Property tests run with `-m slow` too. What takes longest begins first, so that no process is left with it when
    the others have ended. On a GPU the end to end tests train, and in the end stop, the session's server: they come
    last."""
    if _slow(config):
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(pytest.mark.slow)
    if GPU:
        items.sort(key=lambda item: item.path.name == "test_end_to_end.py")
    else:
        items.sort(key=lambda item: next((n for n, long in enumerate(LONGEST) if long in item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, all those of SERVER in one: each that needs the session's server starts one.
    Files are begun in the order of `items`."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return SERVER if SERVER in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    """Threads that a test started have ended soon after it: a daemon thread would disturb, or log into, later tests."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + THREAD_SECONDS
    # A loop's idle helpers end with the loop, which may be that of a fixture of several tests.
    # So do those that compile kernels for a GPU. And torch's own threads, in which hooks of a backward pass run, are
    # known to Python as dummies for ever.
    lasting = ("asyncio_", "compile_", "Dummy-")
    new = [one for one in threading.enumerate() if one not in before and not one.name.startswith(lasting)]
    for thread in new:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread.name for thread in new if thread.is_alive()]
    assert not left, f"threads that outlive their test: {left}"


@pytest.fixture(autouse=True)
def signal_handlers_are_put_back() -> Iterator[None]:
    """RQ's workers install handlers and leave them: one that a test, or a fixture of several tests, ran here would
    answer a later Ctrl-C."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


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
    make_tiny(folder, vision=MULTI_MODAL, real_heads=GPU)  # a GPU's kernels are chosen by the heads
    return folder


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small random model of an architecture (worker/testing/tiny_architectures.py), made once."""
    from worker.testing.tiny_architectures import make_architecture

    torch_setup.prepare()  # before transformers looks at torchvision
    folder = tmp_path_factory.mktemp("architectures")
    return cache(lambda name: make_architecture(folder / name, name))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The Redis in which `server` keeps its completions; tests may stop it and start it again."""
    with RedisServer(tmp_path_factory.mktemp("kept")) as running:
        yield running


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, kept: RedisServer) -> Iterator[ServerProcess]:
    """A real vLLM serving the tiny model, for tests that leave it as they found it. It keeps completions and takes
    feedback, so that all that is tested here holds with both."""
    environment = {"REDIS_URL": kept.url, "TANDEM_FEEDBACK_KEY": FEEDBACK_KEY}
    options = [*SERVER_OPTIONS, *FEEDBACK_OPTIONS]
    with ServerProcess(tiny_model, tmp_path_factory.mktemp("run"), extra=options, env=environment) as running:
        yield running
