"""What the fuzz tests say of recorded answers: any key, any value, any user, over whatever lies in Redis.

Two people's records lie there. Nothing that is said under another key reads, changes or rates them, and everything that
is accepted is a transcript that a worker can read.
"""

from collections import Counter
from typing import Any

import msgpack
import redis
from completion_parts import completion
from fuzz_bytes import packed, plain
from hypothesis import strategies as st

from producer import InvalidTranscriptError, Producer, UnknownCompletionError, keys
from producer.completions import save
from producer.opinions import Source
from producer.said import Said, user_digest
from producer.transcript import ID_PATTERN
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch

VICTIMS = ("V" * 22, "v" * 21 + "-")
TARGET = "t" * 22
"""The record that may be rated, and damaged."""

near = st.sampled_from(VICTIMS).flatmap(
    lambda key: st.sampled_from(
        [key[:-1], key + "A", key.swapcase(), key.lower() + " ", f"completion:{key}", f"{key}\n", f"{key}:9", f"{key}*"]
    )
)


def mostly(sound: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Four in five are `sound`: otherwise next to nothing would come to be queued."""
    return st.integers(0, 4).flatmap(lambda drawn: odd if drawn == 4 else sound)


any_key = mostly(st.just(TARGET), near | st.sampled_from(["chatcmpl-7", "*", "", "../x", "index"]) | plain)
users = mostly(st.sampled_from(["u1", "u2", "u3", None]), st.text(max_size=8) | plain)
ratings = mostly(
    st.sampled_from([1, -1, 0, 0.5, True, False, 1e-300, -0.0]), st.sampled_from([2, "1", None]) | st.floats() | plain
)
texts = mostly(
    st.sampled_from(["Better.", "Best."]),
    st.text(max_size=30) | st.sampled_from(["Goethe.", "x" * 9000, "<think>"]) | plain,
)
message = {"role": st.sampled_from(["assistant", "user"]) | plain, "content": texts, "tool_calls": plain, "x": plain}
answers = mostly(texts, st.fixed_dictionaries({}, optional=message))
words = st.one_of(
    st.tuples(st.just("rate"), ratings), st.tuples(st.just("correct"), answers), st.tuples(st.just("comment"), texts)
)


class Opinions:
    """Ratings, corrections and comments of any form under any key."""

    name, size = "opinions", 1
    cases = st.tuples(any_key, words, users)

    def __init__(self, url: str) -> None:
        self.connection, self.producer = redis.Redis.from_url(url), Producer(url)
        self.queue = open_queue(self.connection)

    def take(self, case: tuple[Any, tuple[str, Any], Any]) -> Counter[str]:
        key, (method, value), user = case
        self.prepare()
        before = self.of_victims()
        try:
            sent = getattr(self.producer, method)(key, value, user=user)
            outcome = str(sent.outcome)
            assert key == TARGET and ID_PATTERN.fullmatch(sent.id)
        except UnknownCompletionError:
            outcome = "unknown"
            assert key != TARGET
        except InvalidTranscriptError as error:
            outcome = "refused"
            assert error.field and error.problem
        assert self.of_victims() == before
        self.check_queue()
        return Counter([outcome])

    def prepare(self) -> None:
        """Three records, and what was said so far; afresh when others have emptied Redis, or when much lies there."""
        if self.connection.llen(self.queue.key) > 12 or not self.connection.exists(keys.completion(TARGET)):
            self.connection.flushall()
            for at, key in enumerate((TARGET, *VICTIMS)):
                save(self.connection, completion(key=key, user=f"owner{at}"), 36_000, 1 << 24)
            for key in VICTIMS:
                self.producer.rate(key, 1)

    def of_victims(self) -> list[Any]:
        index = self.connection.hgetall(keys.FEEDBACK_USERS)
        ids = sorted(job_id for job_id, raw in index.items() if Source.unpack(raw).key in VICTIMS)
        jobs = [self.connection.hgetall(b"rq:job:" + job_id) for job_id in ids]
        names = [make(key) for key in VICTIMS for make in (keys.completion, keys.said)]
        return [ids, jobs, self.connection.mget(names)]

    def check_queue(self) -> None:
        """Each queued id is there once, a transcript that can be read, and known to be somebody's."""
        ids = [raw.decode() for raw in self.connection.lrange(self.queue.key, 0, -1)]
        assert len(ids) == len(set(ids))
        for job in fetch(self.queue, ids):
            assert job is not None and job.transcript().kind in ("liked", "disliked", "correction", "comment")
        assert set(ids) <= {raw.decode() for raw in self.connection.hkeys(keys.FEEDBACK_USERS)}


def record_with(changes: dict[str, Any]) -> bytes:
    whole = msgpack.unpackb(completion(key=TARGET).pack())
    try:
        return bytes(msgpack.packb(whole | changes, datetime=True))
    except (OverflowError, ValueError):
        return b""


names = st.sampled_from(
    ["messages", "answer", "tools", "user", "versions", "token_ids", "logprobs", "chat_template_kwargs", "format", "x"]
)
records = mostly(
    st.sampled_from([{}, {"user": "u1"}, {"messages": completion().messages}]).map(record_with),
    st.one_of(st.binary(max_size=60), packed, st.dictionaries(names, plain, max_size=3).map(record_with)),
)
digests = st.sampled_from(["", user_digest("u1"), user_digest("u2"), "x"])
pasts = st.one_of(
    st.binary(max_size=40),
    packed,
    st.builds(
        lambda *parts: bytes(msgpack.packb([1, *parts])),
        st.integers(-1, 3),
        st.dictionaries(digests, st.floats(-1, 1), max_size=3),
        st.booleans(),
        st.dictionaries(digests.map("correction:{}".format), st.tuples(st.integers(-1, 3), st.text(max_size=4))),
    ),
    st.builds(lambda n: Said(n, {user_digest("u1"): 1.0}).pack(), st.integers(0, 5)),
)


class PlantedRecords(Opinions):
    """What is said of a record that somebody planted in Redis, over a past that somebody planted, too."""

    name, size = "planted records", 1
    cases = st.tuples(records, pasts, words, st.sampled_from([None, "u1", "u2"]))

    def take(self, case: tuple[bytes, bytes, tuple[str, Any], str | None]) -> Counter[str]:  # type: ignore[override]
        record, past, (method, value), user = case
        self.prepare()
        before = self.of_victims()
        if record:
            self.connection.set(keys.completion(TARGET), record, px=36_000_000)
        self.connection.set(keys.said(TARGET), past, px=36_000_000)
        try:
            outcome = str(getattr(self.producer, method)(TARGET, value, user=user).outcome)
        except UnknownCompletionError as error:
            outcome = "unreadable"
            assert "cannot be read" in str(error)
        except InvalidTranscriptError as error:
            outcome = "refused"
            assert error.field and error.problem
        self.connection.set(keys.completion(TARGET), completion(key=TARGET).pack(), px=36_000_000)
        assert self.of_victims() == before
        self.check_queue()
        return Counter([outcome])
