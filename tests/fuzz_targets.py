"""What the fuzz tests throw at every door that bytes come in by: queue, sockets, shared records, header.

A target makes cases (a hypothesis strategy) and takes one (`take`), on the real part; it returns what became of it, one
word a piece, so that every case is accounted for. Whatever else happens, an exception that is none of ours, a hang, a
process or an unpickling started (`Watch`), is a failure.
"""

import asyncio
import contextlib
import pickle
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import redis
import torch
from drain_parts import Lines, Weights, start
from hypothesis import strategies as st
from rq.exceptions import DeserializationError
from rq.registry import FailedJobRegistry
from stand_in import Engine

from producer import Producer, keys
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker import wire
from worker.jobs import FeedbackJob
from worker.serving.client import server_state
from worker.serving.control import Control
from worker.serving.state import ServerState
from worker.weights.client import read_header
from worker.weights.header import HEADER_BYTES, Header, HeaderError
from worker.weights.record import RecordArea, RecordError
from worker.weights.service import WeightService

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
FIELDS = ["status", "timeout", "created_at", "retries_left", "result_ttl", "meta", "dependency_ids", "origin", "ttl"]
FIELDS += ["success_callback_name", "webhooks", "repeats_left", "retry_intervals", "rate_limit_key", "exc_info"]


class Evil:
    """Unpickled, it would call a shell; `Watch` sees that it was looked up at all."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("true",))


class Watch:
    """Sees every process started and every class looked up by pickle in this process, between `with` and its end."""

    EVENTS = frozenset(
        {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
    )
    _hooked = False
    _seen: list[str] | None = None

    def __enter__(self) -> list[str]:
        if not Watch._hooked:  # a hook cannot be taken away again
            sys.addaudithook(Watch._hook)
            Watch._hooked = True
        Watch._seen = []
        return Watch._seen

    def __exit__(self, *_: object) -> None:
        Watch._seen = None

    @staticmethod
    def _hook(event: str, arguments: Any) -> None:
        if Watch._seen is not None and event in Watch.EVENTS:
            Watch._seen.append(event)


# Bytes

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10)
    | st.binary(max_size=10) | st.sampled_from(["worker.train", "os.system", "state", "hello", "pause", "resume"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
    ),
    max_leaves=20,
)  # fmt: skip
nasty = st.sampled_from([
    b"\xdd\xff\xff\xff\xff", b"\xc7\x0c\xff" + b"\xff" * 12, b"\x91" * 900 + b"\xc0", b"\x91" * 5000 + b"\xc0",
    b"\xdf\x00\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81\x80\xc0", b"\xc1", pickle.dumps(Evil()),
])  # fmt: skip
packed = st.binary(max_size=200) | plain.map(msgpack.packb) | nasty


# The queue


def call(transcript: Any) -> bytes:
    return msgpack.packb([keys.FUNCTION, None, [transcript], {}])


almost = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), plain, max_size=4), max_size=4),
        "weight": plain,
        "train_on": plain,
        "tools": plain,
        "chat_template_kwargs": plain,
        "id": plain,
    },
).map(call)
payload = st.one_of(packed, almost, plain.map(call)).flatmap(
    lambda data: st.sampled_from([data, zlib.compress(data), zlib.compress(zlib.compress(data))])
)
extras = st.dictionaries(st.sampled_from(FIELDS), st.binary(max_size=20) | st.just(pickle.dumps(Evil())), max_size=4)


class QueueRead:
    """A job's hash, as it comes from Redis."""

    name, size = "job hashes read", 1
    cases = st.tuples(payload, extras)

    def take(self, case: tuple[bytes, dict[str, bytes]]) -> Counter[str]:
        data, extra = case
        job = FeedbackJob("x", connection=redis.Redis(), serializer=MsgpackSerializer)
        job.restore({name.encode(): value for name, value in extra.items()} | {b"data": data})
        try:
            job.transcript()
            outcome = "accepted"
        except (TandemError, DeserializationError):
            outcome = "refused"
        assert job.to_dict()  # it can be saved again, to be marked as failed
        return Counter([outcome])


class QueueDrain:
    """A queue full of such jobs and of ids that are none, drained by the real worker beside a good one."""

    name, size = "jobs drained", 25
    job_ids = st.binary(max_size=12) | st.text("abc-_:/.", max_size=8).map(str.encode)
    cases = st.lists(st.tuples(job_ids, payload, extras), min_size=25, max_size=25)

    def __init__(self, url: str, folder: Path) -> None:
        self.connection, self.producer, self.folder = redis.Redis.from_url(url), Producer(url), folder

    def take(self, case: list[tuple[bytes, bytes, dict[str, bytes]]]) -> Counter[str]:
        self.connection.flushall()
        weights, lines = Weights(self.folder), Lines()
        weights.set_header("a" * 32, 0, "CLEAN")
        (self.folder / "weights").unlink(missing_ok=True)
        pushed = {b"%d-" % i + job_id: (data, extra) for i, (job_id, data, extra) in enumerate(case)}
        with self.connection.pipeline() as pipe:
            for job_id, (data, extra) in pushed.items():
                pipe.hset(b"rq:job:" + job_id, mapping={"data": data} | extra)
                pipe.rpush(f"rq:queue:{keys.QUEUE}", job_id)
            pipe.execute()
        self.producer.enqueue(GOOD, id="good")
        start(self.connection, weights, hooks=[lines], linger=0, heartbeat=60).work(burst=True)
        failed = set(FailedJobRegistry(keys.QUEUE, connection=self.connection).get_job_ids(cleanup=False))
        waiting = {raw.decode() for raw in self.connection.zrange(f"rq:scheduled:{keys.QUEUE}", 0, -1)}
        trained = set(weights.trained) - {"good"}
        assert "good" in weights.trained and len(weights.trained) == len(set(weights.trained))
        assert self.connection.llen(f"rq:queue:{keys.QUEUE}") == 0
        assert self.connection.llen(f"rq:queue:{keys.QUEUE}:intermediate") == 0
        dropped = len(lines.notices)
        canceled = len(pushed) - len(failed) - len(trained) - len(waiting) - dropped
        statuses = [self.connection.hget(b"rq:job:" + job_id, "status") for job_id in pushed]
        assert canceled == sum(status == b"canceled" for status in statuses), (failed, trained, waiting, lines.notices)
        counts = {"failed": len(failed), "trained": len(trained), "waits for its retry": len(waiting)}
        return Counter(counts | {"dropped": dropped, "canceled": canceled})


# Sockets

messages = plain.map(lambda value: {"op": value}) | st.dictionaries(st.text(max_size=5), plain, max_size=4)
requests = st.one_of(
    messages,
    st.sampled_from([{"op": op} for op in ("describe", "header", "state", "pause", "hello", "resume")]),
    st.builds(lambda name: {"op": "hello", "name": name}, plain | st.text(max_size=120)),
    st.builds(lambda version: {"op": "resume", "version": version}, plain | st.integers(0, 2)),
)
framed = st.one_of(requests.map(msgpack.packb), packed).map(lambda body: struct.pack(">I", len(body)) + body)
stream = st.lists(framed | st.binary(max_size=20) | st.just(b"\xff\xff\xff\xff"), max_size=6).map(b"".join)


def converse(path: str, data: bytes) -> list[dict[str, Any]]:
    """Send `data`, close our half, read the answers until the other side ends; every answer must be a map."""
    answers = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)  # a hang, which fails
        sock.connect(path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        try:
            while (answer := wire.receive(sock)) is not None:
                answers.append(answer)
        except wire.WireError as error:
            assert "reset" in str(error), error  # closed with our bytes unread: nothing was answered
    return answers


class Sockets:
    """Both sockets of a server, as the stand-in has them, in this process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = wire.prepare_run_dir(run_dir)
        self.header = Header(torch.zeros(HEADER_BYTES, dtype=torch.uint8))
        self.header.adopt("b" * 32, 0)
        self.engine = Engine()
        self.service = WeightService(self.run_dir, {"describe": self.header.fields, "header": self.header.fields})
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True).start()
        assert started.wait(30)

    async def _serve(self, started: threading.Event) -> None:
        state = ServerState("b" * 32, 0)
        self.control = Control(self.engine, state, self.run_dir, {"chat_template": None, "template_kwargs": {}})
        await self.control.start()
        started.set()
        await asyncio.Event().wait()


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
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(30)
            theirs.sendall(case)
            theirs.close()
            try:
                while wire.receive(ours) is not None:
                    pass
            except wire.WireError:
                return Counter(["refused"])
        return Counter(["answered"])


# Shared memory

flips = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=12)


def corrupt(data: torch.Tensor, changes: list[tuple[int, int]]) -> None:
    for position, value in changes:
        data[position % data.numel()] = value


class Record:
    """A record area whose bytes were changed: a record as it was written, none, or a clear refusal."""

    name, size = "record areas", 1
    cases = st.tuples(st.lists(st.dictionaries(st.text(max_size=5), plain, max_size=4), max_size=3), flips)

    def take(self, case: tuple[list[dict[str, Any]], list[tuple[int, int]]]) -> Counter[str]:
        records, changes = case
        memory = torch.zeros(4096, dtype=torch.uint8)
        area, written = RecordArea(memory), [None]
        for record in records:
            with contextlib.suppress(RecordError):  # too large for this small area
                area.write(record)
                written.append(record)
        corrupt(memory, changes)
        try:
            found = area.read()
        except RecordError:
            return Counter(["refused"])
        same = [msgpack.packb(found) == msgpack.packb(record) for record in written]
        assert any(same), "a record that nobody wrote"
        return Counter(["whole"])


class HeaderBytes:
    """A header whose bytes were changed."""

    name, size = "headers", 1
    cases = st.one_of(flips, st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))

    def take(self, case: Any) -> Counter[str]:
        memory = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        header = Header(memory)
        header.adopt("c" * 32, 5)
        if isinstance(case, bytes):
            memory.copy_(torch.frombuffer(bytearray(case), dtype=torch.uint8))
        else:
            corrupt(memory, case)
        try:
            assert header.fields()["state"] in ("CLEAN", "APPLYING")
        except HeaderError:
            return Counter(["refused"])
        return Counter(["read"])


def targets(url: str, folder: Path) -> Iterator[Any]:
    """One of each, on a real Redis at `url` (emptied again and again)."""
    sockets = Sockets(folder / "run")
    (folder / "weights").mkdir()
    yield from (QueueRead(), QueueDrain(url, folder / "weights"), WeightsSocket(sockets), ControlSocket(sockets))
    yield from (Answers(), Record(), HeaderBytes())
