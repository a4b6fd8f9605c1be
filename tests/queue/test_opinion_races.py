"""Feedback from many at once, against a worker that takes and trains it meanwhile: nothing lost, nothing twice."""

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from drain_parts import drain
from opinion_parts import Remembering, queued, recorded

from producer import Outcome, Producer, keys
from producer.completions import Completion
from producer.opinions import Opinion, Source, give
from producer.outcomes import Sent
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch, take


def while_training(connection: redis.Redis, weights: Remembering, users: list[Callable[[], None]]) -> None:
    """Run `users` in threads, and a worker over and over until all have ended and the queue is empty."""
    failed: list[BaseException] = []
    start = threading.Barrier(len(users))

    def run(user: Callable[[], None]) -> None:
        try:
            start.wait()
            user()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drain(connection, weights, max_jobs=3)
    for thread in threads:
        thread.join()
    drain(connection, weights)
    assert not failed and queued(connection) == []


STEPS = 14
"""More than an exchange has that is disturbed once."""


def interrupted(
    connection: redis.Redis, one: Completion, opinion: Opinion, step: int, act: Callable[[], object]
) -> None:
    """Say `opinion`, with `act` done by somebody else before the exchange's step of this number, or after its last."""
    with connection.pipeline() as pipe:
        exchange, answer = give(pipe, one, opinion), None
        for count in range(1000):
            if count == step:
                act()
            try:
                answer = exchange.send(answer)
            except StopIteration:
                if count < step:
                    act()
                return
    raise AssertionError("an exchange without end")


@pytest.mark.parametrize("act", ["take", "train", "another user", "the same user", "cancels out"])
@pytest.mark.parametrize("value", [-0.5, -1])
def test_whatever_comes_between_two_steps_every_rating_counts_once(
    redis_url: str, connection: redis.Redis, tmp_path: Path, act: str, value: float
) -> None:
    """One user's rating waits in the queue. A second one rates, and before each single step of that something else
    happens. -1 cancels the first."""
    weights, answers = Remembering(tmp_path), [recorded(connection) for _ in range(STEPS)]
    with Producer(redis_url) as other:
        for step, one in enumerate(answers):
            other.rate(one.key, 1, user="u1")
            acts = {
                "take": lambda: take(open_queue(connection), 99, 0),
                "train": lambda: drain(connection, weights),
                "another user": lambda key=one.key: other.rate(key, 0.25, user="u3"),
                "the same user": lambda key=one.key: other.rate(key, 0.75, user="u2"),
                "cancels out": lambda key=one.key: other.rate(key, 0, user="u1"),
            }
            interrupted(connection, one, Opinion.rating(value, "u2"), step, acts[act])
    drain(connection, weights)
    assert len(weights.trained) == len(set(weights.trained)) and connection.hlen("weights:lost") == 0
    wanted = {"another user": [1.25 + value], "cancels out": [value]}.get(act, [1 + value])
    if act == "the same user":  # whichever of its two came last
        wanted = [1 + value, 1.75]
    totals = trained_by_answer(connection, weights)
    for one in answers:
        total = totals.get(one.key, 0.0)
        assert any(math.isclose(total, number, abs_tol=1e-9) for number in wanted), (total, wanted)


def test_a_lost_answer_of_redis_makes_no_rating_count_twice(
    redis_url: str, connection: redis.Redis, tmp_path: Path
) -> None:
    """Whichever command's answer is lost, EXEC's too, and though a worker trains before the next attempt."""
    weights, answers = Remembering(tmp_path), [recorded(connection) for _ in range(STEPS)]
    with Producer(redis_url) as other:
        for step, one in enumerate(answers):
            other.rate(one.key, 1, user="u1")
            with connection.pipeline() as pipe:
                exchange, answer, count = give(pipe, one, Opinion.rating(-0.5, "u2")), None, 0
                with contextlib.suppress(StopIteration):
                    while True:
                        answer = exchange.send(answer)
                        if count == step:
                            pipe.reset()
                            drain(connection, weights)
                            answer = exchange.throw(redis.WatchError("a ConnectionError occurred while watching"))
                        count += 1
    drain(connection, weights)
    totals = trained_by_answer(connection, weights)
    assert [totals[one.key] for one in answers] == [0.5] * STEPS


def trained_by_answer(connection: redis.Redis, weights: Remembering) -> dict[str, float]:
    """The sum of the ratings that were trained, by the record's key."""
    totals: dict[str, float] = {}
    jobs = dict(zip(weights.trained, fetch(open_queue(connection), weights.trained), strict=True))
    for job_id, said in weights.given:
        key = Source.unpack(connection.hget(keys.FEEDBACK_USERS, job_id)).key
        totals[key] = totals.get(key, 0.0) + said.rating * jobs[job_id].meta["users"]
    return totals


def test_every_users_rating_counts_once(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    """Each user rates each answer once. However the ratings fell into rounds, the sum over all that was trained is the
    sum over all users: none was lost, none is in two rounds."""
    answers, weights = [recorded(connection) for _ in range(6)], Remembering(tmp_path)
    users, sent = 8, {one.key: [] for one in answers}

    def user(number: int) -> Callable[[], None]:
        def rate() -> None:
            with Producer(redis_url) as producer:
                for one in answers:
                    sent[one.key].append(producer.rate(one.key, (number + 1) / users, user=f"u{number}"))

        return rate

    while_training(connection, weights, [user(number) for number in range(users)])
    assert len(weights.trained) == len(set(weights.trained)) == len(weights.given)
    totals = trained_by_answer(connection, weights)
    assert all(math.isclose(totals[one.key], sum(range(1, users + 1)) / users) for one in answers)
    counts = [job.meta["users"] for job in fetch(open_queue(connection), weights.trained)]
    assert sum(counts) == users * len(answers)
    outcomes = {entry.outcome for entries in sent.values() for entry in entries}
    assert outcomes <= {Outcome.QUEUED, Outcome.REPLACED}


def test_a_users_last_word_is_trained_last(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    """Each user corrects an answer ten times. What was taken before the next came was trained; the last was."""
    one, weights = recorded(connection), Remembering(tmp_path)
    sent: dict[int, list[Sent]] = {number: [] for number in range(4)}

    def user(number: int) -> Callable[[], None]:
        def correct() -> None:
            with Producer(redis_url) as producer:
                for turn in range(10):
                    sent[number].append(producer.correct(one.key, f"{number} says {turn}", user=f"u{number}"))

        return correct

    while_training(connection, weights, [user(number) for number in sent])
    assert len(weights.trained) == len(set(weights.trained))
    for number, entries in sent.items():
        ids = {entry.id for entry in entries}
        turns = [
            int(said.messages[-1]["content"].rpartition(" ")[2]) for job_id, said in weights.given if job_id in ids
        ]
        assert turns == sorted(set(turns)) and turns[-1] == 9, f"user {number}: {turns}"
        assert len(turns) == len(ids) == [entry.outcome for entry in entries].count(Outcome.QUEUED)


def test_a_rating_that_comes_and_goes_leaves_nothing(redis_url: str, connection: redis.Redis, tmp_path: Path) -> None:
    """Thumbs up and taken back, again and again, while a worker takes what it finds: each is trained once or was taken
    out, and none of it is lost or left."""
    one, weights = recorded(connection), Remembering(tmp_path)
    sent: list[Sent] = []

    def toggle() -> None:
        with Producer(redis_url) as producer:
            for _ in range(30):
                sent.append(producer.rate(one.key, 1, user="u"))
                sent.append(producer.rate(one.key, 0, user="u"))

    while_training(connection, weights, [toggle])
    assert len(weights.trained) == len(set(weights.trained))
    assert all(transcript.rating == 1 for _, transcript in weights.given)
    assert {entry.id for entry in sent if entry.outcome is Outcome.QUEUED} >= set(weights.trained)
    assert connection.hlen("weights:lost") == 0 and connection.llen("rq:queue:feedback") == 0
