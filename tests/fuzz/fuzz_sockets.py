"""Fuzz targets that are sockets: what a trainer, the API process or anybody else of our uid may send, and be sent."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import torch
from fuzz_bytes import packed, plain
from hypothesis import strategies as st
from patience import PATIENCE
from stand_in import Engine

from worker.serving.control_client import server_state
from worker.serving.vllm.control_server import Control
from worker.serving.vllm.server_state import ServerState
from worker.serving.vllm.weight_service import WeightService
from worker.shared_weights.header import HEADER_BYTES, Header
from worker.shared_weights.weights_client import read_header
from worker.utils import unix_socket

messages = plain.map(lambda value: {"op": value}) | st.dictionaries(st.text(max_size=5), plain, max_size=4)
requests = st.one_of(
    messages,
    st.sampled_from(
        [{"op": op} for op in ("describe", "header", "revoke", "state", "pause", "hello", "resume", "renew")]
    ),
    st.builds(lambda name: {"op": "hello", "name": name}, plain | st.text(max_size=120)),
    st.builds(
        lambda op, seconds: {"op": op, "seconds": seconds},
        st.sampled_from(["pause", "begin_hogwild", "renew"]),
        plain | st.floats(1, 100),
    ),
    st.builds(lambda version: {"op": "resume", "version": version}, plain | st.integers(0, 2)),
)


def _frame(message: Any) -> bytes:
    body = msgpack.packb(message)
    return struct.pack(">I", len(body)) + body


framed = st.one_of(requests.map(msgpack.packb), packed).map(lambda body: struct.pack(">I", len(body)) + body)
ours = requests.map(_frame)
junk = st.lists(framed | st.binary(max_size=20) | st.just(b"\xff\xff\xff\xff"), max_size=6)
session = st.lists(requests, max_size=6).map(  # what a trainer says, in any order
    lambda said: [_frame({"op": "hello", "name": "fuzz"}), *map(_frame, said)]
)
stream = st.one_of(junk, st.lists(ours, max_size=6), session).map(b"".join)


def converse(path: str, data: bytes) -> list[dict[str, Any]]:
    """Send `data`, close our half, read the answers until the other side ends; every answer must be a map."""
    answers = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)  # a hang, which fails
        sock.connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        try:
            while (answer := unix_socket.receive(sock)) is not None:
                answers.append(answer)
        except unix_socket.WireError as error:
            assert "reset" in str(error), error  # closed with our bytes unread: nothing was answered
    return answers


class Sockets:
    """Both sockets of a server, as the stand-in has them, in this process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = unix_socket.prepare_run_dir(run_dir)
        self.header = Header(torch.zeros(HEADER_BYTES, dtype=torch.uint8))
        self.header.adopt("b" * 32, 0)
        self.engine = Engine()
        self.service = WeightService(
            self.run_dir, {"describe": self.header.fields, "header": self.header.fields, "revoke": self.header.revoke}
        )
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        assert started.wait(PATIENCE)

    def close(self) -> None:
        """Answer no more, and end the threads."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self.service.close()

    async def _serve(self, started: threading.Event) -> None:
        state = ServerState("b" * 32, 0)
        rendering = {"chat_template": None, "template_kwargs": {}}
        self.control = Control(self.engine, state, self.run_dir, rendering, self.engine.freeze)
        await self.control.start()
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._ended.wait()


class WeightsSocket:
    """Bytes on weights.sock."""

    name, size = "streams on weights.sock", 1
    cases = stream

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets

    def take(self, case: bytes) -> Counter[str]:
        answers = converse(str(self.sockets.run_dir / "weights.sock"), case)
        assert read_header(self.sockets.run_dir) == self.sockets.header.fields()
        return Counter(["refused" if not answers or "error" in answers[-1] else "answered"])


class ControlSocket:
    """Bytes on control.sock; afterwards the server serves, whatever was asked of it."""

    name, size = "streams on control.sock", 1
    cases = stream

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets

    def take(self, case: bytes) -> Counter[str]:
        answers = converse(str(self.sockets.run_dir / "control.sock"), case)
        for _ in range(500):  # a lost lease is settled just after the connection has ended
            state = server_state(self.sockets.run_dir)
            if state["trainer"] is None and state["state"] == "serving":
                break
        assert state["state"] == "serving" and state["trainer"] is None, state
        assert not self.sockets.engine.paused
        return Counter(["refused" if not answers or "error" in answers[-1] else "answered"])


class Answers:
    """Bytes that come back from a server, as a trainer reads them."""

    name, size = "answers read", 1
    cases = stream

    def take(self, case: bytes) -> Counter[str]:
        near, theirs = socket.socketpair()
        with near, theirs:
            near.settimeout(PATIENCE)
            theirs.sendall(case)
            theirs.close()
            try:
                while unix_socket.receive(near) is not None:
                    pass
            except unix_socket.WireError:
                return Counter(["refused"])
        return Counter(["answered"])
