"""AsyncProducer: the same calls as `Producer`, awaited. Nothing here blocks the event loop but validation itself.

Native rather than calls in threads, because a `wait` would hold its thread for as long as training takes, and a
handful of them would use up asyncio's default pool. Validation is plain computing: 30 us for a transcript of 1 KB.
Must not know: the worker. Invariants: those of client.py, whose jobs.py it shares.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis
import redis.asyncio

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
from producer.transcript import InvalidTranscript, Transcript, check_id


class AsyncProducer:
    """As `producer.Producer`, for one event loop. `Enqueued.job` is not offered: reading an RQ job would block."""

    def __init__(self, url: str | None = None) -> None:
        url = resolve_url(url)
        self.where = safe_url(url)
        self._redis: Any = connect(url, redis.asyncio.Redis.from_url)
        self._unused: redis.Redis = connect(url, redis.Redis.from_url)  # RQ's Job wants one; it never connects

    async def enqueue(
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
        """See `Producer.enqueue`."""
        given = {"id": id, "messages": messages, "train_on": train_on, "weight": weight, "meta": meta}
        given |= {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        transcript = Transcript.from_dict(given)
        with redis_errors(self.where):
            return (await self._send([submission(transcript, self._unused)]))[0]

    async def enqueue_many(
        self, transcripts: Iterable[Transcript | dict[str, Any]]
    ) -> list[Enqueued | InvalidTranscript]:
        """See `Producer.enqueue_many`. Gives way to the loop between pipelines; validates everything first."""
        ready, refused = collect(transcripts, self._unused)
        sent: list[Enqueued] = []
        try:
            with redis_errors(self.where):
                for chunk in chunks(ready):
                    sent += await self._send(chunk)
        except QueueUnavailable as error:
            error.queued = sent
            raise
        return merge(sent, refused)

    async def version(self) -> int:
        """The version of the weights that is live; 0 before the first update."""
        with redis_errors(self.where):
            return int(await self._redis.get(keys.VERSION) or 0)

    async def status(self, job_id: str) -> Status:
        """See `Producer.status`."""
        return (await self._status(check_id(job_id)))[0]

    async def wait(self, job_id: str, timeout: float | None = None) -> int:
        """See `Producer.wait`. Holds one connection while it waits."""
        check_id(job_id)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status, last = await self._status(job_id)
            version = settled(status)
            if version is not None:
                return version
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise timed_out(status, timeout or 0)
            with redis_errors(self.where):
                await self._redis.xread({results_key(job_id): last}, count=1, block=block_ms(left, self._redis))

    async def close(self) -> None:
        await self._redis.aclose()

    async def __aenter__(self) -> "AsyncProducer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncProducer({self.where!r})"

    async def _status(self, job_id: str) -> tuple[Status, str]:
        with redis_errors(self.where):
            async with self._redis.pipeline(transaction=True) as pipe:
                read_commands(pipe, job_id)
                return status_of(job_id, await pipe.execute(), self._unused)

    async def _send(self, submissions: list[Submission]) -> list[Enqueued]:
        """One transaction, four round trips; begun anew when another client changed one of the jobs meanwhile."""
        chunk = Chunk(submissions)
        async with self._redis.pipeline() as pipe:
            for _ in range(ATTEMPTS):
                try:
                    await pipe.watch(*chunk.keys)
                    chunk.trained(await pipe.hmget(keys.LEDGER, chunk.ids))
                    if chunk.ids and await pipe.exists(*chunk.keys):
                        await pipe.unwatch()
                        for key in chunk.keys:
                            pipe.exists(key)
                        chunk.queued_before(await pipe.execute())
                    elif chunk.ids:
                        pipe.multi()
                        chunk.write(pipe)
                        await pipe.execute()
                        chunk.done()
                    if not chunk.ids:
                        return chunk.outcomes(None)
                except redis.WatchError:
                    continue
        raise contended()
