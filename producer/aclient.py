"""AsyncProducer: the same calls as `Producer`, awaited. Nothing here blocks the event loop but validation itself.

Native rather than calls in threads, because a `wait` would hold its thread for as long as training takes, and a
handful of them would use up asyncio's default pool. Validation is plain computing: 30 us for a transcript of 1 KB.
Must not know: the worker. Invariants: those of client.py, whose exchanges it shares.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import redis.asyncio

from . import exchange
from .completions import load_exchange
from .connection import connect, redis_errors, resolve_url, safe_url
from .errors import QueueUnavailableError
from .eviction import Eviction, EvictionLog
from .jobs import Submission, submission
from .opinions import Opinion, give
from .outcomes import AsyncEnqueued, Outcome, Status
from .transcript import Transcript, check_id


class AsyncProducer:
    """As `Producer`, for one event loop. `job` is not offered: reading an RQ job would block."""

    def __init__(self, url: str | None = None) -> None:
        url = resolve_url(url)
        self.where = safe_url(url)
        self._redis: Any = connect(url, redis.asyncio.Redis.from_url)
        self._eviction_log = EvictionLog()

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
        rating: float | None = None,
        chosen: str | dict[str, Any] | None = None,
        rejected: str | dict[str, Any] | None = None,
        comment: str | None = None,
        method: str | None = None,
    ) -> AsyncEnqueued:
        """See `Producer.enqueue`."""
        given = {"id": id, "messages": messages, "train_on": train_on, "weight": weight, "meta": meta}
        given |= {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        given |= {"method": method, "rating": rating, "chosen": chosen, "rejected": rejected, "comment": comment}
        return (await self._send([submission(Transcript.from_dict(given))]))[0]

    async def enqueue_many(self, transcripts: Iterable[Transcript | dict[str, Any]]) -> list[AsyncEnqueued]:
        """See `Producer.enqueue_many`. Gives way to the loop between transactions; validates everything first."""
        ready, refused = exchange.collect(transcripts, self._refused)
        sent: list[AsyncEnqueued] = []
        try:
            for chunk in exchange.chunks(ready):
                sent += await self._send(chunk)
        except QueueUnavailableError as error:
            error.queued = sent
            raise
        return exchange.merge(sent, refused)

    async def rate(self, key: str, rating: float, *, user: str | None = None) -> AsyncEnqueued:
        """See `Producer.rate`."""
        return await self.say(key, Opinion.rating(rating, user))

    async def correct(self, key: str, answer: str | dict[str, Any], *, user: str | None = None) -> AsyncEnqueued:
        """See `Producer.correct`."""
        return await self.say(key, Opinion.correction(answer, user))

    async def comment(self, key: str, text: str, *, user: str | None = None) -> AsyncEnqueued:
        """See `Producer.comment`."""
        return await self.say(key, Opinion.comment(text, user))

    async def say(self, key: str, opinion: Opinion) -> AsyncEnqueued:
        """See `Producer.say`."""
        with redis_errors(self.where):
            completion = await exchange.run_async(load_exchange(self._redis, key))
            async with self._redis.pipeline() as pipe:
                job_id, outcome = await exchange.run_async(give(pipe, completion, opinion))
        return self._enqueued(job_id, outcome, None)

    async def version(self) -> int:
        """See `Producer.version`."""
        with redis_errors(self.where):
            return await exchange.run_async(exchange.version(self._redis))

    async def status(self, job_id: str) -> Status:
        """See `Producer.status`."""
        check_id(job_id)
        with redis_errors(self.where):
            return (await exchange.run_async(exchange.status(self._redis, job_id)))[0]

    async def wait(self, job_id: str, timeout: float | None = None) -> int:
        """See `Producer.wait`. Holds one connection while it waits."""
        check_id(job_id)
        with redis_errors(self.where):
            return await exchange.run_async(exchange.wait(self._redis, job_id, timeout))

    async def missing(self, ids: Iterable[str]) -> list[str]:
        """See `Producer.missing`."""
        asked = [check_id(job_id) for job_id in ids]
        with redis_errors(self.where):
            return await exchange.run_async(exchange.missing(self._redis, asked))

    async def eviction(self) -> Eviction:
        """See `Producer.eviction`."""
        with redis_errors(self.where):
            return await exchange.run_async(exchange.eviction(self._redis))

    async def close(self) -> None:
        await self._redis.aclose()

    async def __aenter__(self) -> "AsyncProducer":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncProducer({self.where!r})"

    async def _send(self, items: list[Submission]) -> list[AsyncEnqueued]:
        if self._eviction_log.due():
            self._eviction_log.say(await self.eviction(), self.where)
        with redis_errors(self.where):
            async with self._redis.pipeline() as pipe:
                chunk = await exchange.run_async(exchange.enqueue(pipe, items))
        return chunk.outcomes(self._enqueued)

    def _enqueued(self, job_id: str, outcome: Outcome, version: int | None) -> AsyncEnqueued:
        return AsyncEnqueued(job_id, outcome, version, _producer=self)

    def _refused(self, job_id: str, field: str, problem: str) -> AsyncEnqueued:
        return AsyncEnqueued(job_id, Outcome.REFUSED, None, field, problem, self)
