"""Ratings and corrections of recorded answers: what is queued, what replaces what, and what cancels out."""

import asyncio
from pathlib import Path

import pytest
import redis
from completion_parts import ANSWER, QUESTION
from drain_parts import drain
from opinion_parts import Remembering, queued, recorded

from producer import AsyncProducer, InvalidTranscriptError, Outcome, Producer, UnknownCompletionError, keys
from producer.completions import new_key
from producer.errors import TranscriptFailedError
from producer.exchange import run
from producer.opinions import remembered
from producer.said import MAX_SIZE, Said, user_digest
from worker.consumer.jobs import FeedbackJob, open_queue
from worker.consumer.transitions import fetch, take


@pytest.fixture
def weights(tmp_path: Path) -> Remembering:
    return Remembering(tmp_path)


def only_job(connection: redis.Redis) -> FeedbackJob:
    (job_id,) = queued(connection)
    (job,) = fetch(open_queue(connection), [job_id])
    assert job is not None
    return job


def rating(connection: redis.Redis) -> float | None:
    return only_job(connection).transcript().rating


def test_a_rating_is_a_transcript_of_the_recorded_conversation(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    sent = producer.rate(one.key, -1, user="u1")
    assert sent.outcome is Outcome.QUEUED and queued(connection) == [sent.id]
    said = only_job(connection).transcript()
    assert said.messages == [*QUESTION, ANSWER] and said.rating == -1 and said.kind == "disliked"
    assert said.train_on == "last" and said.tools == one.tools
    assert said.chat_template_kwargs == one.chat_template_kwargs
    assert producer.status(sent.id).state == "queued"


def test_a_correction_prefers_the_given_answer(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    producer.correct(one.key, "Johann Wolfgang von Goethe.", user="u1")
    said = only_job(connection).transcript()
    assert said.messages == [*QUESTION, {"role": "assistant", "content": "Johann Wolfgang von Goethe."}]
    assert said.rejected == ANSWER and said.kind == "correction"


def test_a_comment_is_about_the_recorded_answer(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    first = producer.comment(one.key, "Too short.", user="u1")
    assert producer.comment(one.key, " Say when. ", user="u1").outcome is Outcome.REPLACED
    said = only_job(connection).transcript()
    assert said.kind == "comment" and said.comment == "Say when." and said.messages == [*QUESTION, ANSWER]
    assert queued(connection) == [first.id]


def test_the_same_from_an_event_loop(redis_url: str, connection: redis.Redis) -> None:
    one = recorded(connection)

    async def everything() -> None:
        async with AsyncProducer(redis_url) as producer:
            sent = await producer.rate(one.key, True, user="u1")
            assert sent.outcome is Outcome.QUEUED
            assert (await producer.rate(one.key, False, user="u1")).outcome is Outcome.REPLACED
            assert (await producer.rate(one.key, 1, user="u2")).outcome is Outcome.WITHDRAWN
            assert (await producer.correct(one.key, "Better.")).outcome is Outcome.QUEUED
            assert (await producer.comment(one.key, "Too short.")).outcome is Outcome.QUEUED
            with pytest.raises(UnknownCompletionError):
                await producer.rate(new_key(), 1)

    asyncio.run(everything())
    kinds = [job.transcript().kind for job in fetch(open_queue(connection), queued(connection))]
    assert kinds == ["correction", "comment"]


def test_the_same_users_next_rating_replaces_the_last_while_it_is_queued(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    one = recorded(connection)
    first = producer.rate(one.key, 1, user="u1")
    second = producer.rate(one.key, -0.5, user="u1")
    assert second.outcome is Outcome.REPLACED and second.id == first.id
    assert producer.rate(one.key, -0.5, user="u1").outcome is Outcome.KNOWN
    assert queued(connection) == [first.id] and rating(connection) == -0.5
    drain(connection, weights)
    assert [(job_id, said.rating) for job_id, said in weights.given] == [(first.id, -0.5)]


@pytest.mark.parametrize("again", [1, -1])
def test_a_rating_after_training_is_a_new_transcript(
    connection: redis.Redis, producer: Producer, weights: Remembering, again: float
) -> None:
    one = recorded(connection)
    first = producer.rate(one.key, -1, user="u1")
    producer.rate(one.key, -1, user="u2")
    drain(connection, weights)
    second = producer.rate(one.key, again, user="u1")
    assert second.outcome is Outcome.QUEUED and second.id != first.id
    drain(connection, weights)
    assert [said.rating for _, said in weights.given] == [-1, again], "who was trained does not count again"
    assert producer.status(first.id).version == 1 and second.wait(1) == 2


def test_a_rating_while_the_last_is_in_a_workers_hands_is_a_new_transcript(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    """Taken, and not marked in its hash yet: only the queue says that it is gone."""
    one = recorded(connection)
    first = producer.rate(one.key, 1, user="u1")
    producer.correct(one.key, "Better.", user="u1")
    held, _ = take(open_queue(connection), 5, 0)
    assert len(held) == 2 and producer.status(first.id).state == "queued"
    assert producer.rate(one.key, -1, user="u1").outcome is Outcome.QUEUED
    assert producer.correct(one.key, "Best.", user="u1").outcome is Outcome.QUEUED
    assert first.id not in queued(connection) and len(queued(connection)) == 2
    drain(connection, weights)  # puts back what was taken
    assert len(weights.trained) == 4 == len(set(weights.trained))


def test_ratings_of_several_users_are_one_transcript_with_their_mean(
    connection: redis.Redis, producer: Producer
) -> None:
    one = recorded(connection)
    sent = {producer.rate(one.key, value, user=f"u{at}").id for at, value in enumerate([1, 1, -1, 0.5])}
    assert len(sent) == 1 and rating(connection) == pytest.approx(1.5 / 4)
    producer.rate(one.key, -1, user="u0")
    assert rating(connection) == pytest.approx(-0.5 / 4)
    assert only_job(connection).meta == {"feedback": "rating", "users": 4}


def test_ratings_that_cancel_out_leave_the_queue_and_count_later(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    one = recorded(connection)
    first = producer.rate(one.key, 1, user="u1")
    none = producer.rate(one.key, -1, user="u2")
    assert none.outcome is Outcome.WITHDRAWN and queued(connection) == []
    assert not connection.exists(f"rq:job:{first.id}")
    with pytest.raises(TranscriptFailedError, match="cancel out"):
        none.wait(0)
    drain(connection, weights)
    assert weights.trained == [] and connection.hlen(keys.LOST) == 0
    assert producer.rate(one.key, -1, user="u2").outcome is Outcome.WITHDRAWN
    third = producer.rate(one.key, -1, user="u3")
    assert third.outcome is Outcome.QUEUED and rating(connection) == pytest.approx(-1 / 3)
    drain(connection, weights)
    assert weights.trained == [third.id]


@pytest.mark.parametrize("values", [[0.1, 0.2, -0.3], [1, -0.5, -0.5], [0.7, -0.7]])
def test_a_sum_of_zero_is_one_in_spite_of_rounding(
    connection: redis.Redis, producer: Producer, values: list[float]
) -> None:
    one = recorded(connection)
    outcomes = [producer.rate(one.key, value, user=f"u{at}").outcome for at, value in enumerate(values)]
    assert outcomes[-1] is Outcome.WITHDRAWN and queued(connection) == []


def test_a_rating_can_be_taken_back_while_it_is_queued(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    assert producer.rate(one.key, 0, user="u1").outcome is Outcome.WITHDRAWN
    producer.rate(one.key, 1, user="u1")
    producer.rate(one.key, -0.5, user="u2")
    assert producer.rate(one.key, 0, user="u1").outcome is Outcome.REPLACED and rating(connection) == -0.5
    assert producer.rate(one.key, 0, user="u2").outcome is Outcome.WITHDRAWN and queued(connection) == []
    assert connection.hlen(keys.FEEDBACK_USERS) == 0
    assert producer.rate(one.key, 1, user="u2").outcome is Outcome.QUEUED and rating(connection) == 1


def test_what_one_user_says_in_words_does_not_replace_anothers(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    first, other = producer.correct(one.key, "A.", user="u1"), producer.correct(one.key, "B.", user="u2")
    again = producer.correct(one.key, "C.", user="u1")
    assert (again.outcome, again.id) == (Outcome.REPLACED, first.id)
    assert producer.correct(one.key, "C.", user="u1").outcome is Outcome.KNOWN
    assert sorted(queued(connection)) == sorted([first.id, other.id])
    rate = producer.rate(one.key, -1, user="u1")
    assert rate.outcome is Outcome.QUEUED and len(queued(connection)) == 3


def test_without_a_user_it_is_the_word_of_who_asked(connection: redis.Redis, producer: Producer) -> None:
    asked, unknown = recorded(connection, user="u1"), recorded(connection)
    producer.rate(asked.key, 1)
    assert producer.rate(asked.key, -1, user="u1").outcome is Outcome.REPLACED
    producer.rate(unknown.key, 1)
    assert producer.rate(unknown.key, -1).outcome is Outcome.REPLACED, "somebody unknown is one user"


def test_two_answers_are_two_transcripts(connection: redis.Redis, producer: Producer) -> None:
    one, same = recorded(connection), recorded(connection)
    assert one.id == same.id, "a client can choose the completion's id"
    ids = [producer.rate(which.key, 1, user="u").id.rpartition("-") for which in (one, same)]
    assert ids[0][0] != ids[1][0] and ids[0][2] == ids[1][2] == "0", "who knows the one does not know the other"


@pytest.mark.parametrize("key", ["", "chatcmpl-7", "*", "../x", "a" * 22, "a" * 21 + "\n", "\ud800", None, 7])
def test_an_unknown_key_is_refused_and_queues_nothing(connection: redis.Redis, producer: Producer, key: str) -> None:
    recorded(connection)
    says = (lambda: producer.rate(key, 1), lambda: producer.correct(key, "A."), lambda: producer.comment(key, "?"))
    for say in says:
        with pytest.raises(UnknownCompletionError, match="no completion is recorded under this key"):
            say()
    assert queued(connection) == []


@pytest.mark.parametrize(
    ("say", "field"),
    [
        (lambda p, key: p.rate(key, 2), "rating"),
        (lambda p, key: p.rate(key, "up"), "rating"),
        (lambda p, key: p.rate(key, None), "rating"),
        (lambda p, key: p.rate(key, float("nan")), "rating"),
        (lambda p, key: p.rate(key, 1, user=""), "user"),
        (lambda p, key: p.rate(key, 1, user=7), "user"),
        (lambda p, key: p.rate(key, 1, user="x" * 1025), "user"),
        (lambda p, key: p.correct(key, " "), "correction"),
        (lambda p, key: p.correct(key, None), "correction"),
        (lambda p, key: p.correct(key, "Goethe."), "correction"),
        (lambda p, key: p.comment(key, ""), "comment"),
        (lambda p, key: p.comment(key, {"text": "?"}), "comment"),
        (lambda p, key: p.comment(key, "x" * 9000), "comment"),
        (lambda p, key: p.correct(key, {"role": "user", "content": "?"}), "correction"),
        (lambda p, key: p.correct(key, {"content": "x", "audio": {"id": 7}}), "correction.audio"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_field(connection: redis.Redis, producer: Producer, say, field: str) -> None:
    one = recorded(connection)
    with pytest.raises(InvalidTranscriptError) as caught:
        say(producer, one.key)
    assert caught.value.field == field and queued(connection) == []


def test_a_conversation_that_cannot_be_trained_is_refused_when_something_is_said(
    connection: redis.Redis, producer: Producer
) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}
    one = recorded(connection, messages=[image])
    with pytest.raises(InvalidTranscriptError, match=r"messages\[0\].content\[0\].type"):
        producer.rate(one.key, 1)
    assert queued(connection) == [] and not connection.exists(keys.said(one.key))


def test_what_was_said_expires_with_the_record(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    producer.rate(one.key, 1)
    left, of_record = connection.pttl(keys.said(one.key)), connection.pttl(keys.completion(one.key))
    assert left > 0 and abs(left - of_record) < 60_000


LONG = Said(texts={f"{'x' * MAX_SIZE}:": (0, "x")}).pack()


@pytest.mark.parametrize(
    "planted", [None, b"\xc1", b"\x95\x01\x00\x80\xc2", Said(texts={"rating:": (0, "x")}).pack(), LONG], ids=range(5)
)
def test_lost_memory_of_what_was_said_trains_no_transcript_twice(
    connection: redis.Redis, producer: Producer, weights: Remembering, planted: bytes | None
) -> None:
    """Evicted, or overwritten by somebody who can: the next id is one that neither queue nor ledger knows."""
    one = recorded(connection)
    first = producer.rate(one.key, 1, user="u1")
    connection.delete(keys.said(one.key))
    if planted is not None:
        connection.set(keys.said(one.key), planted)
    second = producer.rate(one.key, -1, user="u1")
    assert second.outcome is Outcome.QUEUED and second.id != first.id
    drain(connection, weights)
    connection.delete(keys.said(one.key), f"rq:job:{second.id}")
    third = producer.rate(one.key, -1, user="u1")
    assert third.outcome is Outcome.QUEUED and third.id not in (first.id, second.id)


def test_what_was_said_is_read_up_to_a_bound_and_of_no_other_type(connection: redis.Redis, producer: Producer) -> None:
    """Whoever may write it makes no producer read megabytes, and stops no word of a user."""
    one = recorded(connection)
    name = keys.said(one.key)
    connection.set(name, b"x" * (8 * MAX_SIZE))
    with connection.pipeline() as pipe:
        pipe.watch(name)
        assert len(run(remembered(pipe, name))) == MAX_SIZE + 1
    connection.delete(name)
    connection.rpush(name, "x")
    assert producer.rate(one.key, 1, user="u1").outcome is Outcome.QUEUED
    assert producer.rate(one.key, 1, user="u1").outcome is Outcome.KNOWN, "and then it is remembered"


def test_a_correction_of_an_answer_that_goes_on_from_another_says_what_to_do(
    connection: redis.Redis, producer: Producer
) -> None:
    one = recorded(connection, messages=[*QUESTION, ANSWER])
    with pytest.raises(InvalidTranscriptError, match="Rate the answer, or comment on it") as caught:
        producer.correct(one.key, "Schiller.")
    assert caught.value.field == "correction" and queued(connection) == []
    assert not connection.exists(keys.said(one.key))
    assert producer.rate(one.key, -1).outcome is producer.comment(one.key, "No.").outcome is Outcome.QUEUED


def test_a_waiting_transcript_counts_even_if_memory_says_that_none_does(
    connection: redis.Redis, producer: Producer
) -> None:
    one = recorded(connection)
    first = producer.rate(one.key, 1, user="u1")
    connection.set(keys.said(one.key), Said(votes={user_digest("u1"): 1.0}, withdrawn=True).pack())
    assert producer.rate(one.key, 0, user="u1").id == first.id and queued(connection) == []
    assert not connection.exists(f"rq:job:{first.id}")


def test_users_are_digests_and_nobody_is_named(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    sent = producer.rate(one.key, 1, user="mary@example.com")
    producer.correct(one.key, "A better answer.", user="mary@example.com")
    for name in connection.keys("*"):
        if not name.startswith(b"completion:"):
            dumped = connection.dump(name)
            assert b"mary" not in name and b"mary" not in dumped
    assert b"mary" not in b"".join(connection.hgetall(f"rq:job:{sent.id}").values())
    assert user_digest("mary@example.com").encode() in connection.hget(keys.FEEDBACK_USERS, sent.id)


def test_many_users_of_one_answer_are_told_apart_up_to_a_bound(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    full = Said(votes={user_digest(f"u{at}"): 1.0 for at in range(1000)})
    connection.set(keys.said(one.key), full.pack())
    full_id = producer.rate(one.key, 1, user="before").id  # that round is not queued: a new one
    connection.set(keys.said(one.key), Said(round=1, votes=full.votes).pack())
    assert full_id.endswith("-1") and queued(connection) == [full_id]
    assert producer.rate(one.key, -1, user="u7").outcome is Outcome.REPLACED
    with pytest.raises(InvalidTranscriptError, match=r"user: 1,000 users"):
        producer.rate(one.key, 1, user="one too many")
