"""The drain against a real Redis and real RQ; the step is a small real one (tests/helpers/drain_parts.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from drain_parts import Lines, Weights, start
from patience import PATIENCE, until
from redis.client import Pipeline
from rq import Queue, Retry, Worker
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.suspension import resume, suspend

from producer import keys
from producer.client import Producer
from producer.errors import TandemError
from producer.serializer import MsgpackSerializer
from worker.config.protocol import Torn, Unavailable
from worker.consumer.error_text import told
from worker.consumer.jobs import FeedbackJob, open_queue
from worker.consumer.pipelines import merge
from worker.versions import ledger


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(tmp_path)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]


def job(connection: redis.Redis, job_id: str) -> Job:
    return FeedbackJob.fetch(job_id, connection=connection, serializer=MsgpackSerializer)


def counts(connection: redis.Redis) -> dict[str, int]:
    kinds = {"failed": FailedJobRegistry, "finished": FinishedJobRegistry, "started": StartedJobRegistry}
    found = {name: kind(keys.QUEUE, connection=connection).get_job_count(cleanup=False) for name, kind in kinds.items()}
    return found | {"queued": Queue(keys.QUEUE, connection=connection).count}


def drain(connection: redis.Redis, weights: Weights, **options: object) -> Lines:
    lines = Lines()
    start(connection, weights, hooks=[lines], **({"linger": 0.0} | options)).work(burst=True)
    return lines


def test_a_batch_is_one_version_and_every_job_has_its_own_result(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    ids = [producer.enqueue(say("good"), id=f"t{i}").id for i in range(10)]
    lines = drain(connection, weights, max_jobs=4)
    assert weights.batches == [ids[:4], ids[4:8], ids[8:]]
    assert [line["jobs"] for line in lines.versions] == [4, 4, 2]
    assert producer.version() == 3 == weights.header["version"]
    assert [producer.wait(i, timeout=PATIENCE) for i in ids] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert [job(connection, i).return_value()["version"] for i in ids[3:5]] == [1, 2]
    assert counts(connection) == {"failed": 0, "finished": 10, "started": 0, "queued": 0}
    assert ledger.versions(connection, ids) == {i: 1 + n // 4 for n, i in enumerate(ids)}
    manifest = ledger.manifest(connection, 1)
    assert manifest["jobs"] == '["t0","t1","t2","t3"]' and float(manifest["loss"]) == 1.5
    assert {"linger_s", "tokenize_s", "step_s"} <= manifest.keys()
    events = connection.xrange(keys.EVENTS)
    assert [entry[b"version"] for _, entry in events] == [b"1", b"2", b"3"]
    assert float(connection.hget(keys.STATE, "commit_s")) > 0
    # Nothing is left behind but jobs, results and the registries: no executions, no lock, nothing in between.
    left = {key.decode().split(":")[1] for key in connection.keys("rq:*")}
    assert left <= {"job", "results", "queues", "finished", "worker", "clean_registries"}, left
    assert not connection.exists(keys.WORKER_LOCK)
    assert all(0 < connection.ttl(f"rq:job:{i}") <= keys.RESULT_TTL for i in ids)


def test_tokens_end_a_batch_and_what_does_not_fit_comes_next_in_order(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    for i, tokens in enumerate([40, 40, 30, 500, 10, 90, 1]):
        producer.enqueue(say(f"tokens {tokens}"), id=f"t{i}")
    drain(connection, weights, max_jobs=8, max_tokens=100)
    assert weights.batches == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"], ["t6"]]


def test_linger_ends_a_batch_that_does_not_fill(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    producer = Producer(redis_url)
    lines = Lines()
    prepare = weights.prepare

    def more(job_id, transcript):  # type: ignore[no-untyped-def]
        """The next job comes while the batch lingers: long before its end, also on a busy machine."""
        if job_id in ("a0", "a1"):
            producer.enqueue(say("good"), id="a1" if job_id == "a0" else "a2")
        return prepare(job_id, transcript)

    weights.prepare = more  # type: ignore[method-assign]
    producer.enqueue(say("good"), id="a0")
    worker = start(connection, weights, hooks=[lines], max_jobs=100, linger=4.0)
    assert worker.work(max_versions=1) == 1
    assert weights.batches == [["a0", "a1", "a2"]]
    assert lines.versions[0]["linger_s"] >= 4.0


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
    queue.enqueue(keys.FUNCTION, {"messages": say("breaks the step")}, job_id="later", retry=Retry(max=1, interval=1))
    drain(connection, weights)
    scheduled = ScheduledJobRegistry(keys.QUEUE, connection=connection)
    assert "later" in scheduled and job(connection, "later").get_status() == JobStatus.SCHEDULED
    time.sleep(2.1)
    drain(connection, weights)
    assert weights.batches == [["later"], ["later"]] and "later" not in scheduled
    assert job(connection, "later").get_status() == JobStatus.FAILED


def test_an_id_is_trained_once_however_often_it_is_queued(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer, queue = Producer(redis_url), open_queue(connection)
    producer.enqueue(say("good"), id="one")
    for _ in range(3):
        connection.rpush(queue.key, "one")  # an id that sits in the list several times
    producer.enqueue(say("good"), id="two")
    drain(connection, weights)
    assert weights.trained == ["one", "two"]
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="one")  # past the producer, months later
    drain(connection, weights)
    assert weights.trained == ["one", "two"] and producer.version() == 1
    assert job(connection, "one").return_value() == {"version": 1, "already_trained": True}
    assert job(connection, "one").get_status() == JobStatus.FINISHED
    assert connection.llen(queue.intermediate_queue_key) == 0


def test_rq_sees_a_worker_and_running_jobs_during_a_step(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    seen: dict[str, object] = {}
    run = weights.run

    def watch(prepared):  # type: ignore[no-untyped-def]
        (worker,) = Worker.all(connection=connection)
        seen.update(state=worker.get_state(), executions=len(worker.get_current_executions()), **counts(connection))
        connection.expire(keys.WORKER_LOCK, 50)

        def leases() -> list[float]:
            return [score for _, score in connection.zrange(f"rq:wip:{keys.QUEUE}", 0, -1, withscores=True)]

        before = max(leases())
        until(lambda: min(leases()) > before, "every job's lease is renewed")
        until(lambda: connection.ttl(keys.WORKER_LOCK) > 50, "the lock is renewed")
        seen["lock"] = connection.ttl(keys.WORKER_LOCK)
        return run(prepared)

    weights.run = watch  # type: ignore[method-assign]
    for i in range(3):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    drain(connection, weights, heartbeat=0.2)
    assert seen["state"] == "busy" and seen["executions"] == 3 and seen["started"] == 3
    assert 50 < seen["lock"] <= 60
    assert Worker.all(connection=connection) == []


def test_rqs_own_commands_work(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    for i in range(6):
        Producer(redis_url).enqueue(say("unpreparable" if i == 2 else "good"), id=f"t{i}")
    seen: list[str] = []
    run, rq = weights.run, [sys.executable, "-m", "rq.cli"]

    def look(prepared):  # type: ignore[no-untyped-def]
        command = [*rq, "info", "--raw", "-u", redis_url]
        seen.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return run(prepared)

    weights.run = look  # type: ignore[method-assign]
    drain(connection, weights, max_jobs=4, name="w")
    assert "queue feedback 2, 3 executing, 0 finished, 1 failed" in seen[0] and "busy feedback" in seen[0]
    assert "queue feedback 0, 2 executing, 3 finished, 1 failed" in seen[1]
    requeue = ["requeue", "--all", "--queue", keys.QUEUE, "-S", "producer.serializer.MsgpackSerializer"]
    subprocess.run([*rq, *requeue, "-u", redis_url], check=True, capture_output=True)
    assert open_queue(connection).job_ids == ["t2"] and counts(connection)["failed"] == 0


def test_rq_suspend_holds_the_worker_back(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    suspend(connection)
    drain(connection, weights)
    assert weights.trained == [] and counts(connection)["queued"] == 1
    resume(connection)
    drain(connection, weights)
    assert weights.trained == ["t0"]


def test_sigterm_finishes_the_batch_in_hand_and_puts_the_rest_back(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    for i in range(6):
        producer.enqueue(say("stops" if i == 0 else "tokens 60"), id=f"t{i}")
    before = signal.getsignal(signal.SIGTERM)
    worker = start(connection, weights, hooks=[], max_jobs=4, max_tokens=100)
    assert worker.work() == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert weights.trained == ["t0", "t1"]
    assert [i.decode() for i in connection.lrange(worker.queue.key, 0, -1)] == ["t2", "t3", "t4", "t5"]
    assert counts(connection) == {"failed": 0, "finished": 2, "started": 0, "queued": 4}
    assert job(connection, "t2").get_status() == JobStatus.QUEUED
    assert job(connection, "t2").retries_left == keys.MAX_RETRIES
    assert not connection.exists(keys.WORKER_LOCK)


def test_torn_weights_stop_the_worker_and_nothing_is_settled(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    producer = Producer(redis_url)
    producer.enqueue(say("tears"), id="t0")
    producer.enqueue(say("good"), id="t1")
    with pytest.raises(Torn, match="broke off"):
        drain(connection, weights, max_jobs=2)
    assert producer.version() == 0 and counts(connection)["started"] == 2 and counts(connection)["finished"] == 0
    with pytest.raises(TandemError, match=r"torn.*--new-lineage"):
        drain(connection, weights)
    assert not connection.exists(keys.WORKER_LOCK)
    weights.set_header("b" * 32, 0, "CLEAN")  # the server was restarted
    (weights.folder / "record").unlink()
    weights.run = lambda prepared: Weights.run(  # type: ignore[method-assign]
        weights, [type(p)(p.id, p.tokens, "good") for p in prepared]
    )
    drain(connection, weights)
    assert sorted(weights.trained) == ["t0", "t1"] and producer.version() == 1


def test_a_server_that_is_gone_costs_no_job_a_retry(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    for i in range(5):
        Producer(redis_url).enqueue(say("server gone" if i == 3 else "good"), id=f"t{i}")
    with pytest.raises(Unavailable, match="the server is gone"):
        drain(connection, weights, max_jobs=5)
    queue = open_queue(connection)
    assert queue.job_ids == [f"t{i}" for i in range(5)]
    assert counts(connection) == {"failed": 0, "finished": 0, "started": 0, "queued": 5}
    assert job(connection, "t0").retries_left == keys.MAX_RETRIES


def test_a_trainer_that_breaks_on_everything_does_not_empty_the_queue(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(20):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    run = weights.run

    def dead(prepared):  # type: ignore[no-untyped-def]
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    weights.run = dead  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match=r"broke on 3 transcripts in a row.*RuntimeError.*t0, t1, t2"):
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


def test_a_second_worker_is_refused_and_told_who_is_first(connection: redis.Redis, weights: Weights) -> None:
    first = start(connection, weights, hooks=[], name="the-first")
    with pytest.raises(TandemError, match=rf"'the-first' \(pid {os.getpid()} on "):
        start(connection, weights, hooks=[], name="the-second")
    first.work(burst=True)
    start(connection, weights, hooks=[], name="the-second").work(burst=True)


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


def test_dependents_of_a_trained_transcript_are_released(connection: redis.Redis, weights: Weights) -> None:
    queue = open_queue(connection)
    first = queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="first")
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="second", depends_on=first)
    drain(connection, weights)
    assert weights.batches == [["first"], ["second"]]


def test_a_job_on_its_last_try_trains_alone(connection: redis.Redis, weights: Weights) -> None:
    queue = open_queue(connection)
    for i in range(5):
        queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id=f"t{i}", retry=Retry(max=1))
        if i == 2:
            connection.hset("rq:job:t2", "retries_left", 0)
    drain(connection, weights)
    assert weights.batches == [["t0", "t1"], ["t2"], ["t3", "t4"]]


def test_texts_never_reach_logs_titles_or_descriptions(
    redis_url: str, connection: redis.Redis, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the patient said something private"
    queue = open_queue(connection)
    queue.enqueue(keys.FUNCTION, {"messages": say(secret)}, job_id="a", description=secret)
    queue.enqueue(keys.FUNCTION, {"messages": [{"role": "nobody", "content": secret}]}, job_id="b", description=secret)
    queue.enqueue("os.system", secret, job_id="c", description=secret)
    caplog.set_level(10)
    start(connection, weights).work(burst=True, logging_level="DEBUG")
    assert weights.trained == ["a"] and "job b failed" in caplog.text and "version 1" in caplog.text
    assert secret not in caplog.text
    for job_id in "abc":
        fields = connection.hgetall(f"rq:job:{job_id}")
        assert fields[b"description"].decode() == f"transcript {job_id}"
    assert secret not in job(connection, "b").latest_result().exc_string


@pytest.mark.parametrize("when", ["preparing", "training"])
def test_an_error_that_quotes_a_transcript_is_kept_without_its_message(
    redis_url: str, connection: redis.Redis, weights: Weights, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    secret = "the patient said something private"
    producer = Producer(redis_url)
    for i in range(2):
        producer.enqueue(say(f"quoted while {when}: {secret}"), id=f"bad{i}")
        producer.enqueue(say("good"), id=f"good{i}")
    caplog.set_level(10)
    start(connection, weights).work(burst=True, logging_level="DEBUG")
    assert sorted(weights.trained) == ["good0", "good1"]
    kind = "KeyError" if when == "preparing" else "UnicodeEncodeError"
    assert f"job bad0 failed: {kind} (message withheld" in caplog.text and secret not in caplog.text
    for result in job(connection, "bad0").results():
        assert secret not in result.exc_string and "drain_parts.py" in result.exc_string and kind in result.exc_string
    assert producer.status("bad0").reason.startswith(kind)


def test_an_error_from_another_keeps_both_places_and_no_message() -> None:
    try:
        try:
            {}["private"]
        except KeyError as error:
            raise ValueError("private") from error
    except ValueError as error:
        text = told(error)
    assert text.count("test_batch_worker.py") == 2 and text.index("\nKeyError") < text.index("\nValueError")
    assert text.count("private") == 2  # in the two lines of code
    assert told(TandemError("says what to do")) == "TandemError: says what to do"


def test_update_over_weights_is_in_the_manifest_and_the_log(
    redis_url: str, connection: redis.Redis, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    caplog.set_level(20)
    start(connection, weights).work(burst=True)
    assert float(ledger.manifest(connection, 1)["update_ratio"]) == pytest.approx(1e-4)
    assert " · update/weight 1.0e-04 · " in caplog.text


def test_the_lock_is_given_back_even_if_the_jobs_in_hand_cannot_be(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(3):
        Producer(redis_url).enqueue(say("tokens 60"), id=f"t{i}")

    def breaks(prepared):  # type: ignore[no-untyped-def]
        connection.set(f"rq:queue:{keys.QUEUE}", "no list any more")
        raise Torn("broke off")

    weights.run = breaks  # type: ignore[method-assign]
    with pytest.raises(Torn):
        drain(connection, weights, max_tokens=100)
    assert not connection.exists(keys.WORKER_LOCK)


def test_what_is_wrong_with_a_job_does_not_cost_the_lock(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    Producer(redis_url).enqueue(say("good"), id="t0")
    run = weights.run

    def breaks_keys(prepared):  # type: ignore[no-untyped-def]
        connection.set("rq:executions:t0", "no set of executions any more")
        connection.expire(keys.WORKER_LOCK, 30)
        until(lambda: connection.ttl(keys.WORKER_LOCK) > 40, "the lock is renewed")
        return run(prepared)

    weights.run = breaks_keys  # type: ignore[method-assign]
    drain(connection, weights, heartbeat=0.1)
    assert weights.trained == ["t0"] and counts(connection)["finished"] == 1


def test_an_rq_without_what_we_need_is_refused_at_start(
    connection: redis.Redis, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq.VERSION", "3.1.0")
    with pytest.raises(TandemError, match=r"rq 3\.1\.0 is installed"):
        open_queue(connection)
    monkeypatch.undo()
    monkeypatch.delattr(Job, "prepare_for_execution")
    with pytest.raises(TandemError, match=r"lacks Job\.prepare_for_execution"):
        open_queue(connection)


def test_a_name_of_a_dead_worker_elsewhere_can_be_taken_again(connection: redis.Redis, weights: Weights) -> None:
    before = Worker([open_queue(connection)], connection=connection, name="the-worker")
    before.hostname = "a-container-that-is-gone"
    before.register_birth()
    start(connection, weights, hooks=[], name="the-worker").work(burst=True)


def test_a_hook_that_raises_stops_nothing(redis_url: str, connection: redis.Redis, weights: Weights) -> None:
    class Broken(Lines):
        def on_version(self, line: dict[str, object]) -> None:
            raise RuntimeError("a dashboard is down")

    Producer(redis_url).enqueue(say("good"), id="t0")
    start(connection, weights, hooks=[Broken()]).work(burst=True)
    assert counts(connection)["finished"] == 1


def test_an_error_in_the_heartbeat_is_raised_between_steps(
    redis_url: str, connection: redis.Redis, weights: Weights
) -> None:
    for i in range(2):
        Producer(redis_url).enqueue(say("good"), id=f"t{i}")
    worker = start(connection, weights, hooks=[], max_jobs=1, heartbeat=0.05)
    run = weights.run

    def robbed(prepared):  # type: ignore[no-untyped-def]
        connection.set(keys.WORKER_LOCK, '{"name": "robber", "pid": 1}')
        until(lambda: worker.pulse.error is not None, "the heartbeat has noticed")
        return run(prepared)

    weights.run = robbed  # type: ignore[method-assign]
    with pytest.raises(TandemError, match="'robber'"):
        worker.work(burst=True)
    assert weights.trained == ["t0"] and ledger.state(connection).version == 1  # what was trained is committed
    assert b"robber" in connection.get(keys.WORKER_LOCK)


def test_merged_commands_do_what_the_single_ones_did(connection: redis.Redis) -> None:
    def queue(pipe: Pipeline) -> None:
        for i in range(3):
            pipe.hset(f"h{i}", mapping={"a": i})
            pipe.hset(f"h{i}", "b", i)
            pipe.hset("shared", "last", i)
            pipe.zadd("z", {f"m{i}": i})
            pipe.zadd("flagged", {f"m{i}": i}, xx=True)
            pipe.sadd("s", i)
            pipe.zrem("old", f"m{i}")
            pipe.srem("olds", i)
            pipe.delete(f"gone{i}")
            pipe.expire("z", 1000 + i)
            pipe.lrem("l", 1, f"m{i}")

    def prepared() -> Pipeline:
        connection.flushall()
        connection.zadd("old", {f"m{i}": i for i in range(4)})
        connection.sadd("olds", *range(4))
        connection.rpush("l", "m0", "m1", "m1", "m2")
        connection.mset({f"gone{i}": 1 for i in range(4)})
        pipe = connection.pipeline()
        queue(pipe)
        return pipe

    def state() -> dict[bytes, object]:
        dumps = {key: connection.dump(key) for key in connection.keys("*")}
        sets = {key: connection.smembers(key) for key in (b"s", b"olds")}
        return dumps | sets | {b"ttl": connection.ttl("z")}

    prepared().execute()
    single = state()
    pipe = prepared()
    before = len(pipe.command_stack)
    merge(pipe)
    assert len(pipe.command_stack) == before - 3 - 2 * 7
    pipe.execute()
    assert state() == single


def test_the_benchmark_runs_and_batches_save_round_trips(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "queue.py"
    command = [sys.executable, str(script), "--jobs", "64", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "queue.json").read_text())["results"]
    trips = {name: row["round_trips_per_job"] for name, row in found.items()}
    assert trips["RQ SimpleWorker"] > 15 > trips["Tandem, batch 1"] > trips["Tandem, batch 8"]
    assert trips["Tandem, batch 32"] < 1 and (tmp_path / "queue.png").stat().st_size > 5000
