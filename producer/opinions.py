"""Feedback on a recorded completion, as a transcript in the queue: a rating, a correction, a comment.

A transcript's id follows from the record's key, what was said, who said it (ratings: nobody, they count together), and
how often that was taken for training before. While the transcript waits in the queue, what is said next replaces it;
once a worker has taken it, it is a new transcript.

Must not know: the worker.
Invariants: nothing is lost and nothing counts twice, whoever else writes: what was said so far, the job and the queue
are watched from the moment they are read, and changed in one MULTI; so a job is replaced only while it is in the queue.
No user's name is stored here, but a digest (said.py); no text is in an id.
"""

from dataclasses import dataclass
from typing import Any, Literal

import redis
from rq.job import Job

from . import keys
from .completions import Completion
from .errors import InvalidTranscriptError, QueueUnavailableError
from .exchange import ATTEMPTS, Exchange
from .feedback import as_comment, as_rating
from .jobs import QUEUE_KEY, Submission, submission
from .outcomes import Outcome
from .plain import PlainCopy, as_text
from .said import MAX_SIZE, Said, digest, user_digest
from .serializer import MsgpackSerializer
from .transcript import MAX_BYTES, Transcript

What = Literal["rating", "correction", "comment"]

ACL = (
    "+getrange +pttl +lpos %R~completion:* %R~feedback:said:* %R~rq:queue:feedback"
    " (-@all +set %W~feedback:said:*) (-@all +hset +hdel %W~feedback:users)"
    " (-@all +lrem %W~rq:queue:feedback) (-@all +del %W~rq:job:*)"
)
"""What a Redis user needs beside `producer.jobs.ACL` to say something of recorded completions.

It can read a record whose key it knows, and take jobs out of the queue. It cannot list records, write them, or learn
whose opinion it was."""


@dataclass(frozen=True, slots=True, repr=False)
class Opinion:
    """What one user said of a completion. kind: what; user: a digest; value: the rating (0: taken back) or the text."""

    kind: What
    user: str
    value: Any

    @classmethod
    def rating(cls, value: Any, user: str | None) -> "Opinion":
        """Raises InvalidTranscriptError, as the others do."""
        taken_back = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
        rating = 0.0 if taken_back else as_rating(value)
        if rating is None:
            raise InvalidTranscriptError("rating", "is missing: true, false, or a number from -1 to 1")
        return cls("rating", _user(user), rating)

    @classmethod
    def correction(cls, value: Any, user: str | None) -> "Opinion":
        if not isinstance(value, dict) and not as_text(value, "correction").strip():
            raise InvalidTranscriptError("correction", "is empty; give the better answer")
        return cls("correction", _user(user), PlainCopy(MAX_BYTES)(value, "correction"))

    @classmethod
    def comment(cls, value: Any, user: str | None) -> "Opinion":
        if not as_text(value, "comment").strip():
            raise InvalidTranscriptError("comment", "is empty; say what should have been otherwise, or leave it out")
        as_comment(value)  # its length: what is said beside it must not be queued before that is refused
        return cls("comment", _user(user), PlainCopy(MAX_BYTES)(value, "comment"))


def _user(user: Any) -> str:
    if user is None:
        return ""
    text = as_text(user, "user")
    if not text.strip():
        raise InvalidTranscriptError("user", "is empty; leave it out if the user is not known")
    if len(text) > 1024:
        raise InvalidTranscriptError("user", f"has {len(text)} characters, the limit is 1024")
    return user_digest(text)


def transcript_id(completion: Completion, kind: str, user: str, count: int) -> str:
    """Of the transcript that follows from what was said. Who does not know the record's key cannot guess it."""
    return f"fb-{digest('opinion', completion.key, kind, user)}-{count}"


def transcript(completion: Completion, kind: str, value: Any, job_id: str, said_by: int) -> Transcript:
    """The transcript of feedback. said_by: of how many users. Raises InvalidTranscriptError."""
    if kind == "correction" and completion.messages[-1].get("role") == "assistant":
        raise InvalidTranscriptError(
            "correction",
            "is not learnt here: the recorded conversation ends with a message by the assistant, which the answer goes"
            " on from. Rate the answer, or comment on it",
        )
    given: dict[str, Any] = {
        "id": job_id,
        "messages": completion.messages if kind == "correction" else [*completion.messages, completion.answer],
        "tools": completion.tools,
        "chat_template_kwargs": completion.chat_template_kwargs,
        "meta": {"feedback": kind, "users": said_by},
    }
    if kind == "correction":
        given |= {"chosen": value, "rejected": completion.answer}
    else:
        given[kind] = value
    try:
        return Transcript.from_dict(given)
    except InvalidTranscriptError as error:
        if kind != "correction":
            raise
        if error.field == "rejected" and "very answer" in error.problem:
            raise InvalidTranscriptError("correction", "is the very answer that was given; nothing to prefer") from None
        raise InvalidTranscriptError(error.field.replace("chosen", "correction", 1), error.problem) from None


@dataclass(slots=True)
class _Change:
    """What a transaction is to do. item: queued, in place of itself if `replaces`; drop: an id taken out."""

    outcome: Outcome
    job_id: str
    users: list[str]
    item: Submission | None = None
    replaces: bool = False
    drop: bool = False
    write: bool = True


def give(pipe: Any, completion: Completion, opinion: Opinion) -> Exchange[tuple[str, Outcome]]:
    """Queue what was said, or change what waits in the queue; returns the transcript's id and what became of it.

    pipe: a pipeline of redis-py's. Raises InvalidTranscriptError, QueueUnavailableError after `ATTEMPTS` transactions
    that others disturbed, and redis-py's errors.
    """
    if not opinion.user and completion.user:
        opinion = Opinion(opinion.kind, user_digest(completion.user), opinion.value)
    where = keys.said(completion.key)
    last: tuple[bytes, _Change] | None = None
    for _ in range(ATTEMPTS):
        try:
            yield pipe.watch(where)
            raw = yield from remembered(pipe, where)
            if last is not None and raw == last[0]:  # the attempt before went through, and its answer was lost
                yield pipe.unwatch()
                return last[1].job_id, last[1].outcome
            said = Said.unpack(raw)
            ttl = yield pipe.pttl(keys.completion(completion.key))
            change = yield from _decide(pipe, completion, opinion, said)
            if not change.write:
                yield pipe.unwatch()
                return change.job_id, change.outcome
            last = said.pack(), change
            pipe.multi()
            pipe.set(where, last[0], px=max(ttl, 1000))
            _write(pipe, completion, change)
            yield pipe.execute()
            return change.job_id, change.outcome
        except redis.WatchError:
            continue
    raise QueueUnavailableError(
        f"the queue changed during each of {ATTEMPTS} attempts to queue what was said of an answer: try again"
    )


def remembered(pipe: Any, name: str) -> Exchange[bytes]:
    """What Redis has under `keys.said`, at most one byte more than `Said` reads; none where it is of another type."""
    try:
        raw = yield pipe.getrange(name, 0, MAX_SIZE)
    except redis.exceptions.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        raw = b""
    return bytes(raw)


def _decide(pipe: Any, completion: Completion, opinion: Opinion, said: Said) -> Exchange[_Change]:
    """What to do, with everything watched that it depends on. Changes `said` to what is said from now on."""
    return (yield from (_rate if opinion.kind == "rating" else _tell)(pipe, completion, opinion, said))


def _rate(pipe: Any, completion: Completion, opinion: Opinion, said: Said) -> Exchange[_Change]:
    name = ("rating", "")
    job_id = transcript_id(completion, *name, said.round)
    waits = (said.withdrawn or bool(said.votes)) and (yield from _in_queue(pipe, job_id))
    if said.votes and not said.withdrawn and not waits:
        said.next_round()
    before = dict(said.votes)
    said.vote(opinion.user, opinion.value)
    if said.votes == before and (waits or not opinion.value or said.withdrawn):
        return _Change(Outcome.KNOWN if waits else Outcome.WITHDRAWN, job_id, [], write=False)
    rating = said.rating
    said.withdrawn = rating is None
    users = [user for user in said.votes if user]
    if rating is None:
        return _Change(Outcome.WITHDRAWN, job_id, users, drop=waits)
    if not waits:
        said.round = yield from _unknown(pipe, completion, name, said.round)
    job_id = transcript_id(completion, *name, said.round)
    item = submission(transcript(completion, "rating", rating, job_id, len(said.votes)))
    return _Change(Outcome.REPLACED if waits else Outcome.QUEUED, job_id, users, item, waits)


def _tell(pipe: Any, completion: Completion, opinion: Opinion, said: Said) -> Exchange[_Change]:
    name = (opinion.kind, opinion.user)
    count, last = said.text(*name)
    job_id = transcript_id(completion, *name, count)
    waits = bool(last) and (yield from _in_queue(pipe, job_id))
    now = digest(repr(opinion.value))
    if waits and now == last:
        return _Change(Outcome.KNOWN, job_id, [], write=False)
    if not waits:
        count = yield from _unknown(pipe, completion, name, count + bool(last))
        job_id = transcript_id(completion, *name, count)
    said.set_text(*name, count, now)
    item = submission(transcript(completion, opinion.kind, opinion.value, job_id, 1))
    users = [opinion.user] if opinion.user else []
    return _Change(Outcome.REPLACED if waits else Outcome.QUEUED, job_id, users, item, waits)


def _in_queue(pipe: Any, job_id: str) -> Exchange[bool]:
    """Whether no worker has taken the job. Watched: a worker that takes it now makes the transaction begin anew."""
    yield pipe.watch(QUEUE_KEY, Job.key_for(job_id))
    return (yield pipe.lpos(QUEUE_KEY, job_id)) is not None


def _unknown(pipe: Any, completion: Completion, name: tuple[str, str], count: int) -> Exchange[int]:
    """`count`, or, where what was said before is lost, the next whose id neither queue nor ledger knows."""
    while True:
        job_id = transcript_id(completion, *name, count)
        yield pipe.watch(Job.key_for(job_id))
        trained = yield pipe.hget(keys.LEDGER, job_id)
        if trained is None and not (yield pipe.exists(Job.key_for(job_id))):
            return count
        count += 1


def _write(pipe: Any, completion: Completion, change: _Change) -> None:
    """Queue on `pipe`, a transaction, all but what was said."""
    if change.drop:
        pipe.lrem(QUEUE_KEY, 0, change.job_id)
        pipe.delete(Job.key_for(change.job_id))
    if change.item is not None:
        if change.replaces:
            pipe.hset(change.item.job.key, mapping=change.item.fields)
        else:
            change.item.write(pipe)
    source = Source(completion.key, tuple(change.users), user_digest(completion.user))
    if change.item is not None or change.users:  # ratings that cancel out are somebody's, too
        pipe.hset(keys.FEEDBACK_USERS, change.job_id, source.pack())
    else:
        pipe.hdel(keys.FEEDBACK_USERS, change.job_id)


@dataclass(frozen=True, slots=True)
class Source:
    """What a transcript of feedback came from. key: of the record; users: digests of who said it; asked: of who had
    asked, "" where that is not known."""

    key: str
    users: tuple[str, ...]
    asked: str

    def pack(self) -> bytes:
        return MsgpackSerializer.dumps([self.key, self.users, self.asked])

    @classmethod
    def unpack(cls, raw: bytes) -> "Source":
        """An entry of `keys.FEEDBACK_USERS`; one of nobody for what is none."""
        try:
            key, users, asked = MsgpackSerializer.loads(raw)
            fits = all(isinstance(text, str) for text in (key, *users, asked))
        except (ValueError, TypeError):
            fits = False
        return cls(key, tuple(users), asked) if fits else cls("", (), "")
