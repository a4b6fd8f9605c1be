"""Jobs that cannot be trained: they fail alone, are tried again where that may help, and are requeued by a person."""

import pytest
import redis
from drain_parts import Weights, counts, drain, job, say
from rq import Retry
from rq.job import JobStatus
from rq.registry import ScheduledJobRegistry

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from worker.config.protocol import UnavailableError
from worker.consumer.jobs import open_queue
from worker.versions import ledger


def test_poison_fails_alone_and_the_good_around_it_are_trained(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    bad = ["unpreparable", "not finite", "breaks the step", "breaks prepare", "hangs prepare"]
    for i, text in enumerate(bad):
        for n in range(8):
            producer.enqueue(say("good"), id=f"good-{i}-{n}")
        producer.enqueue(say(text), id=text.replace(" ", "-"))
    lines = drain(connection, weights, max_jobs=45, prepare_limit=4)
    good = {f"good-{i}-{n}" for i in range(len(bad)) for n in range(8)}
    assert sorted(weights.trained) == sorted(good)
    assert {name.replace(" ", "-") for name in bad} == set(lines.rejected)
    assert counts(connection) == {"failed": 5, "finished": 40, "started": 0, "queued": 0}
    reasons = {name: job(connection, name.replace(" ", "-")).latest_result().exc_string for name in bad}
    assert reasons["unpreparable"] == "TandemError: this transcript cannot be prepared"
    assert reasons["not finite"] == "loss is not finite"
    assert "drain_parts.py" in reasons["breaks the step"] and "\nRuntimeError (message w" in reasons["breaks the step"]
    assert "in prepare" in reasons["breaks prepare"] and "\nRuntimeError (message w" in reasons["breaks prepare"]
    assert "took more than 4 s" in reasons["hangs prepare"]


def test_what_may_pass_is_retried_and_what_cannot_is_not(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(say("breaks the step"), id="may-pass")
    producer.enqueue(say("unpreparable"), id="cannot")
    drain(connection, weights, max_jobs=1)
    assert [batch for batch in weights.batches if batch == ["may-pass"]] == [["may-pass"]] * (1 + keys.MAX_RETRIES)
    assert len(job(connection, "cannot").results()) == 1
    assert job(connection, "cannot").retries_left == keys.MAX_RETRIES  # a person's requeue has them all


def test_a_failed_job_can_be_requeued_and_trained(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    Producer(redis_url).enqueue(say("unpreparable"), id="again")
    drain(connection, weights)
    assert counts(connection)["failed"] == 1
    weights.prepare = lambda job_id, transcript: Weights.prepare(  # type: ignore[method-assign]
        weights, job_id, type(transcript).from_dict({"messages": say("good")})
    )
    open_queue(connection).failed_job_registry.requeue("again")
    drain(connection, weights)
    assert weights.trained == ["again"] and counts(connection) == {
        "failed": 0,
        "finished": 1,
        "started": 0,
        "queued": 0,
    }


def test_a_retry_with_an_interval_waits_and_runs_without_a_scheduler(connection: redis.Redis, weights: Weights) -> None:
    queue = open_queue(connection)
    queue.enqueue(keys.FUNCTION, {"messages": say("breaks the step")}, job_id="later", retry=Retry(max=1, interval=600))
    drain(connection, weights)
    scheduled = ScheduledJobRegistry(keys.QUEUE, connection=connection)
    assert "later" in scheduled and job(connection, "later").get_status() == JobStatus.SCHEDULED
    connection.zadd(scheduled.key, {"later": 1})  # ten minutes later it is due
    drain(connection, weights)
    assert weights.batches == [["later"], ["later"]] and "later" not in scheduled
    assert job(connection, "later").get_status() == JobStatus.FAILED


def test_a_trainer_that_breaks_on_everything_does_not_empty_the_queue(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(20):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    run = weights.run

    def dead(prepared):  # type: ignore[no-untyped-def]
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    weights.run = dead  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match=r"broke on 3 transcripts in a row.*RuntimeError.*t0, t1, t2"):
        drain(connection, weights, max_jobs=8)
    assert counts(connection) == {"failed": 0, "finished": 0, "started": 0, "queued": 20}
    left = [job(connection, f"t{i}").retries_left for i in range(20)]
    assert left == [keys.MAX_RETRIES - 1] * 3 + [keys.MAX_RETRIES] * 17
    weights.run = run  # type: ignore[method-assign]
    drain(connection, weights, max_jobs=8)
    assert sorted(weights.trained) == sorted(f"t{i}" for i in range(20))


def test_transcripts_at_fault_with_good_ones_between_do_not_stop_the_worker(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(12):
        Producer(redis_url).enqueue(say("breaks the step" if i % 2 else "good"), id=f"t{i}")
        Producer(redis_url).enqueue(say("refused on purpose"), id=f"r{i}")
    retries = {"retries_left": 0}
    for i in range(12):
        connection.hset(f"rq:job:t{i}", mapping=retries)
        connection.hset(f"rq:job:r{i}", mapping=retries)
    lines = drain(connection, weights)
    assert weights.trained == [f"t{i}" for i in range(0, 12, 2)]
    assert lines.rejected["r0"] == "TandemError: the step refuses this batch"
    assert counts(connection)["failed"] == 18


def test_a_step_that_answers_for_other_jobs_commits_nothing(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    run = weights.run

    def forgets(prepared):  # type: ignore[no-untyped-def]
        update = run(prepared)
        update.results.clear()
        return update

    weights.run = forgets  # type: ignore[method-assign]
    with pytest.raises(TandemError, match="did not answer for exactly the jobs"):
        drain(connection, weights)
    assert ledger.state(connection).version == 0
