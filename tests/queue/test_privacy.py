"""Texts of transcripts stay out of logs, titles and errors."""

import pytest
import redis
from drain_parts import Weights, job, say, start
from opinion_parts import recorded

from producer import keys
from producer.client import Producer
from producer.errors import TandemError, UnknownCompletionError
from worker.consumer.error_text import told
from worker.consumer.jobs import open_queue


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


def test_feedback_shows_neither_texts_nor_users(
    redis_url: str, connection: redis.Redis, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in logs, nor in what dashboards show of a job: id, title, meta, result. The text is in its payload alone."""
    secret, user = "the patient said something private", "mary@example.com"
    caplog.set_level(10)
    one = recorded(connection, user=user, messages=[{"role": "user", "content": secret}])
    bad = recorded(connection, user=user, answer={"role": "assistant", "content": "unpreparable"})
    with Producer(redis_url) as producer:
        ids = [producer.rate(one.key, -1).id, producer.correct(one.key, f"Not {secret}.").id]
        ids += [
            producer.comment(one.key, f"Do not say {secret}.", user="eve@example.com").id,
            producer.rate(bad.key, 1).id,
        ]
        for key in (one.key[::-1], f"{secret} {user}"):
            with pytest.raises(UnknownCompletionError) as caught:
                producer.rate(key, 1, user=user)
            assert secret not in str(caught.value) and user not in str(caught.value)
    start(connection, weights, linger=0.0).work(burst=True, logging_level="DEBUG")
    assert weights.trained == ids[:3] and f"job {ids[3]} failed" in caplog.text
    shown = caplog.text + "".join(ids)
    for job_id in ids:
        fields = connection.hgetall(f"rq:job:{job_id}")
        assert fields[b"description"].decode() == f"transcript {job_id}"
        shown += repr({name: value for name, value in fields.items() if name != b"data"})
        shown += repr(connection.xrange(f"rq:results:{job_id}")) + repr(job(connection, job_id).meta)
    words = ("something private", "mary@", "eve@", one.key, bad.key, one.id)
    assert [word for word in words if word in shown] == []


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
    assert text.count("test_privacy.py") == 2 and text.index("\nKeyError") < text.index("\nValueError")
    assert text.count("private") == 2  # in the two lines of code
    assert told(TandemError("says what to do")) == "TandemError: says what to do"
