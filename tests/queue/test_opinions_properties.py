"""Ratings in any order, by anybody, with training in between: the queue holds what a simple model says."""

from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opinion_parts import queued, recorded
from producer_parts import train

from producer import Producer
from producer.opinions import transcript_id
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch

TRAIN = "train"
users, answers = st.sampled_from(["u1", "u2", "u3"]), st.sampled_from(["here", "there"])
steps = st.tuples(users, st.sampled_from([1.0, -1.0, 0.5, 0.0]), answers) | st.just(TRAIN)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(order=st.lists(steps, min_size=3, max_size=14))
def test_any_order_of_ratings_is_what_a_simple_model_says(
    connection: redis.Redis, producer: Producer, order: list[Any]
) -> None:
    """Two dictionaries of votes that wait: after each step the queue holds their means, and no more. What cancels out
    is remembered through a training of the other answer."""
    connection.flushall()
    queue, records = open_queue(connection), {name: recorded(connection) for name in ("here", "there")}
    prefixes = {transcript_id(one, "rating", "", 0)[:-1]: name for name, one in records.items()}
    votes: dict[str, dict[str, float]] = {"here": {}, "there": {}}
    for step in order:
        if step == TRAIN:
            for job_id in queued(connection):
                train(connection, job_id, producer.version() + 1)
                votes[prefixes[job_id.rpartition("-")[0] + "-"]] = {}
        else:
            user, value, name = step
            producer.rate(records[name].key, value, user=user)
            votes[name] = {who: number for who, number in (votes[name] | {user: value}).items() if number}
        jobs = fetch(queue, queued(connection))
        found = {prefixes[job.id.rpartition("-")[0] + "-"]: job.transcript().rating for job in jobs if job}
        assert len(found) == len(jobs)
        wanted = {name: sum(known.values()) / len(known) for name, known in votes.items() if sum(known.values())}
        assert found == {name: pytest.approx(mean) for name, mean in wanted.items()}
