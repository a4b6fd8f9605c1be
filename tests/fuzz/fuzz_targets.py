"""What the fuzz tests throw at every door that bytes come in by: queue, sockets, shared memory, journal.

A target makes cases (a hypothesis strategy) and takes one (`take`), on the real part; it returns what became of it, one
word a piece, so that every case is accounted for. Whatever else happens, an exception that is none of ours, a hang, a
process or an unpickling started (`Watch`), is a failure.
"""

import contextlib
import pickle
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import redis
import torch
from drain_parts import Lines, Weights, start
from fuzz_bytes import Evil, packed, plain
from fuzz_exports import Exports
from fuzz_http import FeedbackBodies
from fuzz_opinions import Opinions, PlantedRecords
from fuzz_sockets import Answers, ControlSocket, Sockets, WeightsSocket
from hypothesis import strategies as st
from rq.exceptions import DeserializationError
from rq.registry import FailedJobRegistry

from producer import Producer, keys
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.checkpoint import record_file
from worker.checkpoint.journal import Journal, JournalError
from worker.checkpoint.records import FILE_FORMAT
from worker.consumer.jobs import FeedbackJob
from worker.shared_weights.batch_record import RecordArea, RecordError
from worker.shared_weights.header import HEADER_BYTES, Header, HeaderError

GOOD = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
FIELDS = ["status", "timeout", "created_at", "retries_left", "result_ttl", "meta", "dependency_ids", "origin", "ttl"]
FIELDS += ["success_callback_name", "webhooks", "repeats_left", "retry_intervals", "rate_limit_key", "exc_info"]


# The queue


def call(transcript: Any) -> bytes:
    return msgpack.packb([keys.FUNCTION, None, [transcript], {}])


almost = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), plain, max_size=4), max_size=4)
        | st.just(GOOD),
        "weight": plain,
        "rating": plain,
        "chosen": plain,
        "rejected": plain,
        "comment": plain | st.just("shorter"),
        "method": plain | st.just("distill"),
        "train_on": plain,
        "tools": plain,
        "chat_template_kwargs": plain,
        "id": plain,
    },
).map(call)


def changed(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with a few bytes changed, and perhaps cut."""
    place = st.integers(0, len(data) - 1)
    return st.builds(
        _change, st.just(data), st.lists(st.tuples(place, st.integers(0, 255)), max_size=3), place | st.none()
    )


def _change(data: bytes, changes: list[tuple[int, int]], end: int | None) -> bytes:
    kept = bytearray(data)
    for place, value in changes:
        kept[place] = value
    return bytes(kept[:end])


valid = call({"messages": GOOD, "weight": 0.5, "train_on": "last"})
breaks = call(
    {"messages": [GOOD[0], GOOD[1] | {"content": "breaks prepare"}]}
)  # an error of ours, retried if it may be
payload = st.one_of(packed, almost, changed(valid), st.sampled_from([valid, breaks]), plain.map(call)).flatmap(
    lambda data: st.sampled_from([data, zlib.compress(data), zlib.compress(zlib.compress(data))])
)
odd = st.sampled_from(
    [b"9", b"-1", b"[]", b"{}", b"[9]", b'["x"]', b"[1e300]", b"[[0]]", b"null", b"NaN", b'"x"', b"[NaN]"]
)
extras = st.dictionaries(
    st.sampled_from(FIELDS), st.binary(max_size=20) | odd | st.just(pickle.dumps(Evil())), max_size=4
)


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


class JournalFile:
    """A file of the journal that was changed or cut: its first records as written, or a clear refusal."""

    name, size = "journal files", 1
    cases = st.tuples(
        st.lists(plain, min_size=1, max_size=5), flips, st.integers(0, 1 << 12) | st.none(), st.booleans()
    )

    def __init__(self, folder: Path) -> None:
        self.file = folder / "00000001.journal"

    def take(self, case: tuple[list[Any], list[tuple[int, int]], int | None, bool]) -> Counter[str]:
        values, changes, end, last = case
        records = [{"kind": "x", "value": value} for value in values]
        data = bytearray(b"".join(map(record_file.pack, records)))
        for place, value in changes:
            data[place % len(data)] = value
        whole = bytes(data[: end if end is None else end % len(data)])
        self.file.write_bytes(whole)
        try:
            found = record_file.scan(self.file, last=last)
        except JournalError:
            return Counter(["refused"])
        assert [msgpack.packb(r) for _, r in found.records] == [msgpack.packb(r) for r in records[: len(found.records)]]
        assert found.end + found.torn == len(whole) and (last or not found.torn)
        assert [record_file.read(self.file, at) for at, _ in found.records] or not found.records
        return Counter(["torn tail" if found.torn else "whole"])


class JournalRecords:
    """A journal of sound records that mean nothing, or nearly what ours mean: opened, or clearly refused."""

    name, size = "journals of odd records", 1
    kinds = st.sampled_from(["update", "rollback", "lineage", "done", "void", "segment", "other"])
    sound = st.fixed_dictionaries(
        {
            "kind": kinds, "version": st.integers(1, 9), "lineage": st.just("a" * 32), "parent": st.just(0),
            "time": st.just(1.0), "batch": st.just([]), "ids": st.just(["t1"]), "manifest": st.just({"loss": 1.0}),
            "dropped": st.just([]), "format": st.just(FILE_FORMAT), "source": st.just("s"),
        }
    )  # fmt: skip
    names = st.sampled_from(["version", "lineage", "parent", "time", "batch", "ids", "manifest", "dropped", "format"])
    odd = st.builds(lambda record, name, value: record | {name: value}, sound, names, plain)
    cases = st.lists(
        sound | odd | st.dictionaries(names, plain).map(lambda record: {"kind": "update"} | record), max_size=5
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, case: list[dict[str, Any]]) -> Counter[str]:
        for old in self.folder.iterdir():
            old.unlink()
        first = {"kind": "segment", "format": FILE_FORMAT, "source": "s", "time": 0.0}
        (self.folder / "00000001.journal").write_bytes(b"".join(map(record_file.pack, [first, *case])))
        try:
            journal = Journal(self.folder, "s")
        except JournalError:
            return Counter(["refused"])
        with contextlib.closing(journal):
            for version in journal.entries:
                assert journal.read(version).version == version
        return Counter(["opened"])


@contextlib.contextmanager
def targets(url: str, folder: Path) -> Iterator[list[Any]]:
    """One of each, on a real Redis at `url` (emptied again and again)."""
    for name in ("weights", "file", "journal"):
        (folder / name).mkdir()
    closing = contextlib.closing
    with closing(Sockets(folder / "run")) as sockets, closing(FeedbackBodies(url)) as bodies:
        found = [QueueRead(), QueueDrain(url, folder / "weights"), WeightsSocket(sockets), ControlSocket(sockets)]
        found += [Answers(), Record(), HeaderBytes(), JournalFile(folder / "file"), JournalRecords(folder / "journal")]
        found += [Opinions(url), PlantedRecords(url), bodies, Exports()]
        yield found
