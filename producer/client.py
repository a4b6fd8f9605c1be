"""Producer: what an application calls to queue transcripts and to learn which version contains them. It blocks.

Must not know: the worker, torch, vLLM. For an event loop use `producer.aclient.AsyncProducer`, the same calls awaited.
Invariants: nothing invalid is queued; an id is queued once (jobs.py); errors are `TandemError`, without passwords.
Safe to share between threads, and across a fork.

The Redis user of a producer needs `producer.jobs.ACL` and nothing more.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis
from rq.exceptions import NoSuchJobError
from rq.job import Job

from producer import keys
from producer.jobs import (
    ATTEMPTS,
    Chunk,
    Enqueued,
    QueueUnavailable,
    Status,
    Submission,
    block_ms,
    chunks,
    collect,
    connect,
    contended,
    merge,
    read_commands,
    redis_errors,
    resolve_url,
    results_key,
    safe_url,
    settled,
    status_of,
    submission,
    timed_out,
)
from producer.serializer import MsgpackSerializer
from producer.transcript import InvalidTranscript, Transcript, check_id


class Producer:
    """Queues transcripts on the Redis at `url` (default: the environment's REDIS_URL, else 127.0.0.1:6379/0).

    No connection is made before the first call. Usable as a context manager; `close` ends its connections.
    """

    def __init__(self, url: str | None = None) -> None:
        url = resolve_url(url)
        self.where = safe_url(url)
        self._redis: redis.Redis = connect(url, redis.Redis.from_url)

    def enqueue(
        self,
        messages: list[dict[str, Any]],
        *,
        id: str | None = None,
        train_on: str | Sequence[int] = "all",
        weight: float = 1.0,
        meta: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Enqueued:
        """Queue one transcript; one round trip. The arguments are those of `Transcript`.

        A known id is not queued again: the answer then is the existing job (`new` False), and the version that contains
        it if it was trained, however long ago. What comes with a known id is not compared with what came first.
        Raises InvalidTranscript, QueueUnavailable.
        """
        given = {"id": id, "messages": messages, "train_on": train_on, "weight": weight, "meta": meta}
        given |= {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        transcript = Transcript.from_dict(given)
        with redis_errors(self.where):
            return self._send([submission(transcript, self._redis)])[0]

    def enqueue_many(self, transcripts: Iterable[Transcript | dict[str, Any]]) -> list[Enqueued | InvalidTranscript]:
        """Queue many, pipelined. Answers in order: what became of each, or, not raised, why it was refused.

        Raises QueueUnavailable; its `queued` then holds the outcomes of those already queued. To repeat such a call
        safely, give every transcript an id.
        """
        ready, refused = collect(transcripts, self._redis)
        sent: list[Enqueued] = []
        try:
            with redis_errors(self.where):
                for chunk in chunks(ready):
                    sent += self._send(chunk)
        except QueueUnavailable as error:
            error.queued = sent
            raise
        return merge(sent, refused)

    def version(self) -> int:
        """The version of the weights that is live; 0 before the first update."""
        with redis_errors(self.where):
            return int(self._redis.get(keys.VERSION) or 0)  # type: ignore[arg-type]

    def status(self, job_id: str) -> Status:
        """Where the transcript with this id is. Raises InvalidTranscript for what cannot be an id."""
        return self._status(check_id(job_id))[0]

    def wait(self, job_id: str, timeout: float | None = None) -> int:
        """Block until the transcript is trained; returns the version that contains it. `timeout` in seconds, or None.

        Sleeps in Redis on the job's result stream, without polling. Raises UnknownTranscript, TranscriptFailed,
        WaitTimeout, QueueUnavailable.
        """
        check_id(job_id)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status, last = self._status(job_id)
            version = settled(status)
            if version is not None:
                return version
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise timed_out(status, timeout or 0)
            with redis_errors(self.where):
                self._redis.xread({results_key(job_id): last}, count=1, block=block_ms(left, self._redis))

    def job(self, job_id: str) -> Job | None:
        """The RQ job of an id, with its data; None if there is none (any more)."""
        with redis_errors(self.where):
            try:
                return Job.fetch(check_id(job_id), connection=self._redis, serializer=MsgpackSerializer)
            except NoSuchJobError:
                return None

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Producer({self.where!r})"

    def _status(self, job_id: str) -> tuple[Status, str]:
        with redis_errors(self.where), self._redis.pipeline(transaction=True) as pipe:
            read_commands(pipe, job_id)
            return status_of(job_id, pipe.execute(), self._redis)

    def _send(self, submissions: list[Submission]) -> list[Enqueued]:
        """One transaction, four round trips; begun anew when another client changed one of the jobs meanwhile."""
        chunk = Chunk(submissions)
        with self._redis.pipeline() as pipe:
            for _ in range(ATTEMPTS):
                try:
                    pipe.watch(*chunk.keys)
                    chunk.trained(pipe.hmget(keys.LEDGER, chunk.ids))
                    if chunk.ids and pipe.exists(*chunk.keys):
                        pipe.unwatch()
                        for key in chunk.keys:
                            pipe.exists(key)
                        chunk.queued_before(pipe.execute())
                    elif chunk.ids:
                        pipe.multi()
                        chunk.write(pipe)
                        pipe.execute()
                        chunk.done()
                    if not chunk.ids:
                        return chunk.outcomes(self._load)
                except redis.WatchError:
                    continue
        raise contended()

    def _load(self, item: Submission, new: bool) -> Callable[[], Job | None]:
        return (lambda: item.job) if new else (lambda: self.job(item.id))
