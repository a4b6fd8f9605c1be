"""Producer: what an application calls to queue transcripts and to learn which version contains them. It blocks.

Must not know: the worker, torch, vLLM. For an event loop use `AsyncProducer`, the same calls awaited.
Invariants: nothing invalid is queued; an id is queued once (exchange.py); errors are `TandemError`, without passwords.
Safe to share between threads, and across a fork.

The Redis user of a producer needs `producer.jobs.ACL` and nothing more; to rate and correct recorded answers also
`producer.opinions.ACL`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import redis
from rq.exceptions import NoSuchJobError
from rq.job import Job

from . import exchange
from .completions import load_exchange
from .connection import connect, redis_errors, resolve_url, safe_url
from .errors import QueueUnavailableError
from .eviction import Eviction, EvictionLog
from .jobs import Submission, submission
from .opinions import Opinion, give
from .outcomes import Enqueued, Outcome, Status
from .serializer import MsgpackSerializer
from .transcript import Transcript, check_id


class Producer:
    """Queues transcripts on the Redis at `url` (default: the environment's REDIS_URL, else 127.0.0.1:6379/0).

    No connection is made before the first call. Usable as a context manager; `close` ends its connections.
    Raises RedisUrlError.
    """

    def __init__(self, url: str | None = None) -> None:
        url = resolve_url(url)
        self.where = safe_url(url)
        self._redis: redis.Redis = connect(url, redis.Redis.from_url)
        self._eviction_log = EvictionLog()

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
        rating: float | None = None,
        chosen: str | dict[str, Any] | None = None,
        rejected: str | dict[str, Any] | None = None,
        comment: str | None = None,
        method: str | None = None,
    ) -> Enqueued:
        """Queue one transcript. The arguments are those of `Transcript`.

        A known id is not queued again: the answer then has the outcome KNOWN, or TRAINED with the version that contains
        it, however long ago. What comes with a known id is not compared with what came first.
        Raises InvalidTranscriptError, QueueUnavailableError.
        """
        given = {"id": id, "messages": messages, "train_on": train_on, "weight": weight, "meta": meta}
        given |= {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        given |= {"method": method, "rating": rating, "chosen": chosen, "rejected": rejected, "comment": comment}
        return self._send([submission(Transcript.from_dict(given))])[0]

    def enqueue_many(self, transcripts: Iterable[Transcript | dict[str, Any]]) -> list[Enqueued]:
        """Queue many, a hundred in a transaction. Answers in order; invalid ones have the outcome REFUSED.

        Raises QueueUnavailableError; its `queued` then holds the outcomes of those already queued. To repeat such a
        call safely, give every transcript an id.
        """
        ready, refused = exchange.collect(transcripts, self._refused)
        sent: list[Enqueued] = []
        try:
            for chunk in exchange.chunks(ready):
                sent += self._send(chunk)
        except QueueUnavailableError as error:
            error.queued = sent
            raise
        return exchange.merge(sent, refused)

    def rate(self, key: str, rating: float, *, user: str | None = None) -> Enqueued:
        """Say how much a recorded answer was liked: true, false, or a number from -1 to 1; 0 takes a rating back.

        key: of the record, as the server sent it with the answer. user: who says it; without it, who asked.
        A user's next rating replaces the last while that is queued, and is a new transcript once it was trained.
        While they are queued, ratings of several users are one transcript with their mean. Outcomes: QUEUED, REPLACED,
        KNOWN (nothing changed), WITHDRAWN (they cancel out: nothing is queued, later ones count with them).
        Raises UnknownCompletionError, InvalidTranscriptError, QueueUnavailableError.
        """
        return self.say(key, Opinion.rating(rating, user))

    def correct(self, key: str, answer: str | dict[str, Any], *, user: str | None = None) -> Enqueued:
        """Give the answer that a recorded one should have been: the model learns to prefer it. Arguments and errors
        are those of `rate`; a user's next correction of the same answer replaces the last while that is queued."""
        return self.say(key, Opinion.correction(answer, user))

    def comment(self, key: str, text: str, *, user: str | None = None) -> Enqueued:
        """Say what should have been otherwise in a recorded answer ("be shorter"): the model learns to answer as if it
        had been told so before. Arguments and errors are those of `rate`; replaced like a correction."""
        return self.say(key, Opinion.comment(text, user))

    def say(self, key: str, opinion: Opinion) -> Enqueued:
        """What `rate`, `correct` and `comment` do."""
        with redis_errors(self.where), self._redis.pipeline() as pipe:
            completion = exchange.run(load_exchange(self._redis, key))
            return self._enqueued(*exchange.run(give(pipe, completion, opinion)), None)

    def version(self) -> int:
        """The version of the weights that is live; 0 before the first update."""
        with redis_errors(self.where):
            return exchange.run(exchange.version(self._redis))

    def status(self, job_id: str) -> Status:
        """Where the transcript with this id is. Raises InvalidTranscriptError for what cannot be an id."""
        check_id(job_id)
        with redis_errors(self.where):
            return exchange.run(exchange.status(self._redis, job_id))[0]

    def wait(self, job_id: str, timeout: float | None = None) -> int:
        """Block until the transcript is trained; returns the version that contains it. `timeout` in seconds, or None.

        Sleeps in Redis on the job's result stream, without polling. Raises UnknownTranscriptError,
        TranscriptFailedError, WaitTimeoutError, QueueUnavailableError.
        """
        check_id(job_id)
        with redis_errors(self.where):
            return exchange.run(exchange.wait(self._redis, job_id, timeout))

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that have no job and are in no version: never queued here, evicted, or deleted."""
        asked = [check_id(job_id) for job_id in ids]
        with redis_errors(self.where):
            return exchange.run(exchange.missing(self._redis, asked))

    def eviction(self) -> Eviction:
        """Whether Redis may throw queued transcripts away; unknown until a worker has started."""
        with redis_errors(self.where):
            return exchange.run(exchange.eviction(self._redis))

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

    def _send(self, items: list[Submission]) -> list[Enqueued]:
        if self._eviction_log.due():
            self._eviction_log.say(self.eviction(), self.where)
        with redis_errors(self.where), self._redis.pipeline() as pipe:
            return exchange.run(exchange.enqueue(pipe, items)).outcomes(self._enqueued)

    def _enqueued(self, job_id: str, outcome: Outcome, version: int | None) -> Enqueued:
        return Enqueued(job_id, outcome, version, _producer=self)

    def _refused(self, job_id: str, field: str, problem: str) -> Enqueued:
        return Enqueued(job_id, Outcome.REFUSED, None, field, problem, self)
