"""Unix sockets of a process that is busy, or has no descriptors left: whoever asks is not turned away for it."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from patience import until

from worker.serving.vllm import weight_service
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.weights_client import ask
from worker.utils import unix_socket
from worker.utils.unix_socket import WireError


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A listening socket that accepts nobody, where no more connections may wait."""
    monkeypatch.setattr(unix_socket, "WAITING", 1)
    listening = unix_socket.bind(str(tmp_path / "sock"))
    with ExitStack() as stack:
        stack.enter_context(listening)
        for _ in range(2):
            stack.enter_context(unix_socket.connect(str(tmp_path / "sock")))
        yield listening


def test_who_finds_a_full_queue_waits_for_its_turn(crowded: socket.socket) -> None:
    found: list[socket.socket] = []
    asking = threading.Thread(target=lambda: found.append(unix_socket.connect(crowded.getsockname(), 600)))
    asking.start()
    asking.join(0.2)
    crowded.accept()[0].close()
    asking.join()
    found[0].close()


def test_a_server_that_accepts_nobody_is_told_from_one_that_is_not_there(crowded: socket.socket) -> None:
    path = crowded.getsockname()
    with pytest.raises(WireError, match="accepts nobody: it hangs, or is stopped"):
        unix_socket.connect(path, 0.1)
    with pytest.raises(WireError, match="in use by a process that accepts nobody"):
        unix_socket.bind(path)


def test_the_weights_are_answered_for_when_descriptors_were_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_service, "REST", 0.01)
    service = WeightService(tmp_path, {"header": lambda: {"version": 3}})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with socket.socket(socket.AF_UNIX) as waiting:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            waiting.connect(str(tmp_path / weight_service.SOCKET))
            until(lambda: "are not accepted" in caplog.text, "lack a descriptor")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert ask(tmp_path, "header")[0] == {"version": 3}
    finally:
        service.close()
