"""What a producer and Redis say to each other, written once for both clients.

Each exchange is a generator. It yields what a call on redis-py's client or pipeline gave, and is sent the answer: from
the blocking client that is the same object (`run`), from asyncio's it is awaited first (`run_async`). Must not know:
sockets.
Invariants: an id is queued only if neither its job nor the permanent ledger knows it, which is decided under WATCH and
done in one MULTI, so that racing producers cannot both win; no script runs, so that a producer's Redis user needs none.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

import redis
from rq.job import Job

from . import keys
from .connection import block_ms
from .errors import InvalidTranscriptError, QueueUnavailableError
from .eviction import LIMIT, POLICY, Eviction
from .jobs import Submission, failure_reason, results_key, settled, submission, timed_out
from .outcomes import Outcome, Sent, State, Status
from .transcript import Transcript

T = TypeVar("T")
SentT = TypeVar("SentT", bound=Sent)
Exchange: TypeAlias = Generator[Any, Any, T]

CHUNK_JOBS = 100
CHUNK_BYTES = 8 * 1024 * 1024
"""A transaction is sent when either is reached."""

MOST_VERSIONS = 2**53
"""A version is below it, and so the same number in Redis, in JSON and as a metric."""

ATTEMPTS = 100
"""How often a transaction is begun anew because another client changed one of its jobs meanwhile."""


def run(exchange: Exchange[T]) -> T:
    """With redis-py's blocking client: every answer is there already."""
    answer: Any = None
    try:
        while True:
            answer = exchange.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


async def run_async(exchange: Exchange[T]) -> T:
    """With redis-py's asyncio client: every answer is awaited, and its error is raised where the exchange waits."""
    try:
        said = exchange.send(None)
        while True:
            try:
                answer = await said
            except Exception as error:
                said = exchange.throw(error)
            else:
                said = exchange.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


class Chunk:
    """Some submissions on their way into the queue in one transaction. An id that comes twice is queued once."""

    def __init__(self, items: list[Submission]) -> None:
        self._items = items
        self._left: dict[str, Submission] = {}
        for item in items:
            self._left.setdefault(item.id, item)
        self._version: dict[str, int] = {}
        self._new: set[int] = set()

    @property
    def ids(self) -> list[str]:
        """Those that are not settled yet."""
        return list(self._left)

    @property
    def keys(self) -> list[str]:
        return [item.job.key for item in self._left.values()]

    def trained(self, versions: list[Any]) -> None:
        """The ledger's answers for `ids`."""
        known = {id: as_version(version) for id, version in zip(self.ids, versions, strict=True) if version is not None}
        self._version |= known
        self._settle(known)

    def queued_before(self, exists: list[int]) -> None:
        """Redis' answers for `keys`. An id made up here can exist only because the answer to an EXEC was lost."""
        present = [item for item, there in zip(list(self._left.values()), exists, strict=True) if there]
        self._new |= {id(item) for item in present if item.made_up}
        self._settle(item.id for item in present)

    def write(self, pipe: Any) -> None:
        for item in self._left.values():
            item.write(pipe)

    def done(self) -> None:
        """EXEC went through."""
        self._new |= {id(item) for item in self._left.values()}
        self._left = {}

    def _settle(self, ids: Iterable[str]) -> None:
        gone = set(ids)
        self._left = {id: item for id, item in self._left.items() if id not in gone}

    def outcomes(self, make: Callable[[str, Outcome, int | None], SentT]) -> list[SentT]:
        """In the order of the items."""
        return [make(item.id, self._outcome(item), self._version.get(item.id)) for item in self._items]

    def _outcome(self, item: Submission) -> Outcome:
        if item.id in self._version:
            return Outcome.TRAINED
        return Outcome.QUEUED if id(item) in self._new else Outcome.KNOWN


def enqueue(pipe: Any, items: list[Submission]) -> Exchange[Chunk]:
    """Queue `items`, in four round trips; begun anew when another client changed one of the jobs meanwhile.

    Raises QueueUnavailableError after `ATTEMPTS`, and redis-py's errors.
    """
    chunk = Chunk(items)
    for _ in range(ATTEMPTS):
        try:
            yield pipe.watch(*chunk.keys)
            chunk.trained((yield pipe.hmget(keys.LEDGER, chunk.ids)))
            if chunk.ids and (yield pipe.exists(*chunk.keys)):
                yield pipe.unwatch()
                for key in chunk.keys:
                    pipe.exists(key)
                chunk.queued_before((yield pipe.execute()))
            elif chunk.ids:
                pipe.multi()
                chunk.write(pipe)
                yield pipe.execute()
                chunk.done()
            if not chunk.ids:
                return chunk
        except redis.WatchError:
            continue
    raise QueueUnavailableError(
        f"other clients changed the same jobs during each of {ATTEMPTS} attempts to queue them: try again, or give the"
        " transcripts other ids"
    )


def status(client: Any, job_id: str) -> Exchange[tuple[Status, str]]:
    """Where a transcript is, and the id of the last entry of its result stream: where a blocking read goes on."""
    pipe = client.pipeline(transaction=True)
    pipe.hget(keys.LEDGER, job_id)
    pipe.hget(Job.key_for(job_id), "status")
    pipe.xrevrange(results_key(job_id), count=1)
    pipe.hget(keys.LOST, job_id)
    version, word, results, lost_at = yield pipe.execute()
    last = results[0][0].decode() if results else "0-0"
    if version is not None:
        return Status(job_id, State.FINISHED, as_version(version)), last
    if word is not None:
        state = State.of(word.decode(errors="replace"))
        reason = failure_reason(job_id, results[0]) if state is State.FAILED and results else None
        return Status(job_id, state, None, reason), last
    if lost_at is not None:
        why = f"the worker found its id without a job in Redis at {lost_at.decode(errors='replace')}"
        return Status(job_id, State.LOST, None, why), last
    return Status(job_id, State.UNKNOWN), last


def wait(client: Any, job_id: str, timeout: float | None) -> Exchange[int]:
    """The version that contains a transcript, once there is one. timeout: seconds, None: for ever."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        now, last = yield from status(client, job_id)
        version = settled(now)
        if version is not None:
            return version
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise timed_out(now, timeout or 0)
        yield client.xread({results_key(job_id): last}, count=1, block=block_ms(left, client))


def missing(client: Any, ids: list[str]) -> Exchange[list[str]]:
    """Those of `ids` that have no job and are in no version."""
    found: list[str] = []
    for start in range(0, len(ids), CHUNK_JOBS):
        part = ids[start : start + CHUNK_JOBS]
        pipe = client.pipeline(transaction=True)
        for job_id in part:
            pipe.exists(Job.key_for(job_id))
        pipe.hmget(keys.LEDGER, part)
        *jobs, versions = yield pipe.execute()
        found += [id for id, job, version in zip(part, jobs, versions, strict=True) if not job and version is None]
    return found


def eviction(client: Any) -> Exchange[Eviction]:
    """What the worker published of Redis' eviction policy."""
    names = (POLICY, LIMIT)
    values = yield client.hmget(keys.STATE, list(names))
    return Eviction.of({name: value.decode() for name, value in zip(names, values, strict=True) if value is not None})


def version(client: Any) -> Exchange[int]:
    """The version of the weights that is live; 0 before the first update."""
    return as_version((yield client.get(keys.VERSION)) or b"0")


def as_version(raw: bytes) -> int:
    """A version as Redis has it. Raises QueueUnavailableError for what no worker wrote."""
    try:
        if abs(found := int(raw)) >= MOST_VERSIONS:
            raise ValueError
        return found
    except ValueError:
        raise QueueUnavailableError(
            "Redis has something that is no version among those of the worker: somebody else wrote there; look at"
            f" {keys.VERSION} and {keys.LEDGER}"
        ) from None


def collect(
    transcripts: Iterable[Transcript | dict[str, Any]], refuse: Callable[[str, str, str], SentT]
) -> tuple[list[Submission], dict[int, SentT]]:
    """What can be sent, in order, and, by its place in the input, what cannot.

    refuse: makes an outcome from id, field and problem.
    """
    ready: list[Submission] = []
    refused: dict[int, SentT] = {}
    for place, item in enumerate(transcripts):
        try:
            transcript = item if isinstance(item, Transcript) else Transcript.from_dict(item)
        except InvalidTranscriptError as error:
            given = item.get("id") if isinstance(item, dict) else None
            refused[place] = refuse(given if isinstance(given, str) else "", error.field, error.problem)
        else:
            ready.append(submission(transcript))
    return ready, refused


def merge(sent: list[SentT], refused: dict[int, SentT]) -> list[SentT]:
    """The outcomes in the order of the input."""
    rest = iter(sent)
    return [refused[place] if place in refused else next(rest) for place in range(len(sent) + len(refused))]


def chunks(submissions: list[Submission]) -> Iterator[list[Submission]]:
    """Parts that are each sent in one transaction."""
    chunk: list[Submission] = []
    size = 0
    for item in submissions:
        if chunk and (len(chunk) == CHUNK_JOBS or size + item.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item.size
    if chunk:
        yield chunk
