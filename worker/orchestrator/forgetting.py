"""What Redis holds of one user, and taking it out: records of completions, opinions, jobs with their transcripts.

A user is found by what applications put into a transcript's meta (producer/users.py), by the `user` of recorded
requests, and by the digests that feedback leaves (producer/opinions.py).

Must not know: torch.
Invariants: what is said of a user is found as long as any trace of it is left, since traces go last; other users' parts
of shared ratings stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import redis
from rq.job import Job
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
)

from producer import completions, keys, users
from producer.completions import Completion
from producer.errors import UnknownCompletionError
from producer.exchange import run
from producer.jobs import results_key
from producer.opinions import Opinion, Source, give, remembered
from producer.progress import progress
from producer.said import Said, user_digest
from producer.serializer import MsgpackSerializer
from worker.consumer.jobs import open_queue
from worker.versions import ledger

AT_ONCE = 500
REGISTRIES = (FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry, ScheduledJobRegistry, DeferredJobRegistry)


@dataclass
class Found:
    """waiting: ids in the queue; shared: those of them that are ratings of others too; stored: other ids with a job;
    held: those of them that a worker took and has not settled; trained: id -> version, of those who may be in the
    weights; dropped: ids that were taken out of the weights before. records: keys of recorded completions; sources:
    id -> where feedback came from."""

    user: str
    waiting: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        return not (self.waiting or self.stored or self.trained or self.dropped or self.records or self.sources)


def look(connection: redis.Redis, user: str) -> Found:
    """Everything that Redis has of `user`. Reads all names of jobs and all records: it may take a while."""
    with progress("looking for the user", unit="names") as shown:
        return _look(connection, user, shown.advance)


def _look(connection: redis.Redis, user: str, looked: Callable[[int], object]) -> Found:
    found, name = Found(user), user_digest(user)
    for job_id, raw in connection.hscan_iter(keys.FEEDBACK_USERS, count=1000):
        source = Source.unpack(raw)
        if _is_of(source, name):
            found.sources[job_id.decode(errors="replace")] = source
    jobs = set(_by_meta(connection, user, looked))
    ids = sorted(jobs | found.sources.keys())
    queue = open_queue(connection)
    in_queue = {raw.decode(errors="replace") for raw in connection.lrange(queue.key, 0, -1)}  # type: ignore[union-attr]
    for part in _parts(ids):
        with connection.pipeline(transaction=False) as pipe:
            for job_id in part:
                pipe.hget(Job.key_for(job_id), "status")
            pipe.hmget(keys.DROPPED, part)
            *states, dropped = pipe.execute()
        trained = ledger.versions(connection, part)
        for job_id, state, out in zip(part, states, dropped, strict=True):
            if job_id in in_queue:
                found.waiting.append(job_id)
                if _is_shared(found.sources.get(job_id), name):
                    found.shared.append(job_id)
            elif state is not None:
                found.stored.append(job_id)
                if job_id not in trained and state in (b"queued", b"started"):
                    found.held.append(job_id)
            if out is not None:
                found.dropped.append(job_id)
            elif job_id in trained:
                found.trained[job_id] = trained[job_id]
    found.records = [one.key for one in _records(connection) if one.user == user]
    return found


def take_out(connection: redis.Redis, found: Found, still: Sequence[str] = ()) -> None:
    """Remove what `found` has from Redis. still: ids that are in the weights still, which stay findable. Call it with
    the worker lock held: nobody may be taking these jobs. May be repeated."""
    name = user_digest(found.user)
    others = {source.key for source in found.sources.values() if source.asked != name}
    alive = {key for key in others if _retract(connection, key, name)}
    with progress("taking out of Redis", len(found.waiting) + len(found.stored), "transcripts") as shown:
        for job_id in [*found.waiting, *found.stored]:
            if not (job_id in found.shared and found.sources[job_id].key in alive):
                _delete_job(connection, job_id)
            shown.advance()
    for key in {source.key for source in found.sources.values()}:
        _unsay(connection, key, name)
    for key in found.records:
        connection.delete(keys.said(key))
        completions.remove(connection, key)
    for part in _parts(id for id in found.sources if id not in set(still)):
        now: Any = connection.hmget(keys.FEEDBACK_USERS, part)
        gone = [id for id, raw in zip(part, now, strict=True) if raw is not None and _is_of(Source.unpack(raw), name)]
        if gone:
            connection.hdel(keys.FEEDBACK_USERS, *gone)


def _by_meta(connection: redis.Redis, user: str, looked: Callable[[int], object]) -> Iterator[str]:
    """Ids of jobs whose application said in their meta that they are the user's. looked: told how many were read."""
    prefix = Job.key_for("").encode()
    for part in _parts(connection.scan_iter(match=prefix + b"*", count=1000, _type="hash")):
        with connection.pipeline(transaction=False) as pipe:
            for key in part:
                pipe.hget(key, "meta")
            metas = pipe.execute(raise_on_error=False)
        for key, raw in zip(part, metas, strict=True):
            if isinstance(raw, bytes) and user in _users_in(raw):
                yield key.removeprefix(prefix).decode(errors="replace")
        looked(len(part))


def _users_in(raw: bytes) -> tuple[str, ...]:
    try:
        return users.of(MsgpackSerializer.loads(raw))
    except ValueError:
        return ()


def _records(connection: redis.Redis) -> Iterator[Completion]:
    for key in set(completions.recorded(connection)):
        try:
            yield completions.load(connection, key)
        except UnknownCompletionError:
            continue  # it has expired meanwhile, or nobody can read it


def _is_of(source: Source, name: str) -> bool:
    return name in source.users or name == source.asked


def _is_shared(source: Source | None, name: str) -> bool:
    """Whether others rated the same answer in one transcript with the user, who had not asked for it."""
    return source is not None and source.asked != name and len(source.users) > 1


def _retract(connection: redis.Redis, key: str, name: str) -> bool:
    """Take the user's rating out of those that wait together, or cancel out. False where the record of the answer is
    gone."""
    try:
        completion = completions.load(connection, key)
    except UnknownCompletionError:
        return False
    with connection.pipeline() as pipe:
        run(give(pipe, completion, Opinion("rating", name, 0.0)))
    return True


def _unsay(connection: redis.Redis, key: str, name: str) -> None:
    """Take the user out of what is remembered of an answer."""

    def change(pipe: Any) -> None:
        said = Said.unpack(run(remembered(pipe, keys.said(key))))
        pipe.multi()
        if said.forget(name):
            pipe.set(keys.said(key), said.pack(), keepttl=True)

    connection.transaction(change, keys.said(key))


def _delete_job(connection: redis.Redis, job_id: str) -> None:
    """The job with its transcript, wherever RQ lists it. The ledger keeps its id, so that it never comes back."""
    queue = open_queue(connection)
    with connection.pipeline() as pipe:
        for name in (queue.key, queue.intermediate_queue_key):
            pipe.lrem(name, 0, job_id)
        for registry in REGISTRIES:
            pipe.zrem(registry(queue=queue).key, job_id)
        pipe.delete(Job.key_for(job_id), results_key(job_id))
        pipe.execute()


def _parts(items: Any) -> Iterator[list[Any]]:
    rest = iter(items)
    while part := list(islice(rest, AT_ONCE)):
        yield part
