"""What Redis holds of a user is found, all of it and nobody else's, and is gone afterwards."""

from pathlib import Path

import pytest
import redis
from drain_parts import drain, say, start
from enqueue_parts import tandem
from opinion_parts import Remembering, queued, recorded
from rq.registry import FailedJobRegistry, FinishedJobRegistry

from producer import Outcome, Producer, keys
from producer.completions import load
from producer.errors import UnknownCompletionError
from producer.said import user_digest
from worker.consumer.jobs import open_queue
from worker.consumer.transitions import fetch, take
from worker.orchestrator.forgetting import look, take_out


@pytest.fixture
def weights(tmp_path: Path) -> Remembering:
    return Remembering(tmp_path)


def everything(connection: redis.Redis) -> bytes:
    """All names and values that Redis has, but for the ledger and the versions, which hold ids alone."""
    parts = []
    for name in connection.keys("*"):
        if not name.startswith(b"weights:"):
            kind = connection.type(name)
            read = {
                b"string": connection.get,
                b"hash": connection.hgetall,
                b"list": lambda n: connection.lrange(n, 0, -1),
            }
            parts += [name, repr(read[kind](name) if kind in read else "").encode()]
    return b"".join(parts)


def test_queued_transcripts_go_and_those_of_others_stay(connection: redis.Redis, producer: Producer) -> None:
    for job_id, user in [("a", "mary"), ("b", "bob"), ("c", "mary"), ("d", None), ("e", 7)]:
        producer.enqueue(say("x"), id=job_id, meta={"user": user} if user else None)
    found = look(connection, "mary")
    assert found.waiting == ["a", "c"] and not found.trained and not found.shared
    take_out(connection, found)
    assert queued(connection) == ["b", "d", "e"] and not connection.exists("rq:job:a", "rq:job:c")
    assert look(connection, "mary").nothing
    assert look(connection, "7").waiting == ["e"]


def test_an_ended_jobs_transcript_goes_and_its_id_stays_known(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    producer.enqueue(say("good"), id="a", meta={"user": "mary"})
    producer.enqueue(say("unpreparable"), id="b", meta={"user": "mary"})
    drain(connection, weights)
    found = look(connection, "mary")
    assert (found.stored, found.trained, found.waiting, found.held) == (["a", "b"], {"a": 1}, [], [])
    take_out(connection, found, ["a"])
    assert not connection.exists("rq:job:a", "rq:job:b", "rq:results:a", "rq:results:b")
    for registry in (FinishedJobRegistry, FailedJobRegistry):
        assert registry(keys.QUEUE, connection=connection).get_job_ids(cleanup=False) == []
    assert producer.enqueue(say("good"), id="a").outcome is Outcome.TRAINED


def test_a_job_that_a_dead_worker_took_is_held_and_goes(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    producer.enqueue(say("x"), id="a", meta={"user": "mary"})
    take(open_queue(connection), 1, 0)
    found = look(connection, "mary")
    assert found.held == found.stored == ["a"] and found.waiting == []
    take_out(connection, found)
    start(connection, weights, linger=0.0).work(burst=True)
    assert weights.trained == []


def test_recorded_completions_go(connection: redis.Redis) -> None:
    hers, his = [recorded(connection, user="mary") for _ in range(3)], recorded(connection, user="bob")
    found = look(connection, "mary")
    assert sorted(found.records) == sorted(one.key for one in hers)
    take_out(connection, found)
    for one in hers:
        with pytest.raises(UnknownCompletionError):
            load(connection, one.key)
    assert load(connection, his.key) == his and connection.zcard(keys.COMPLETIONS) == 1
    assert int(connection.get(keys.COMPLETION_BYTES)) == len(his.pack()) + 200
    assert look(connection, "mary").nothing


def test_a_users_part_of_shared_ratings_goes_and_the_others_keep_theirs(
    connection: redis.Redis, producer: Producer
) -> None:
    one, alone, level = (recorded(connection) for _ in range(3))
    shared = producer.rate(one.key, 1, user="mary").id
    producer.rate(one.key, -1, user="bob")
    producer.rate(one.key, 1, user="eve")
    producer.correct(one.key, "Better.", user="mary")
    bobs = producer.correct(one.key, "Best.", user="bob").id
    for user, number in [("mary", 1), ("bob", 0.5), ("eve", 0.25)]:
        both = producer.rate(alone.key, number, user=user).id
    producer.rate(level.key, 1, user="mary")
    producer.rate(level.key, -1, user="bob")
    found = look(connection, "mary")
    assert sorted(found.shared) == sorted([shared, both]) and len(found.waiting) == 3
    take_out(connection, found)
    ids = queued(connection)
    assert shared not in ids and {bobs, both} < set(ids), "bob's and eve's rating of the first answer cancel out"
    (again,) = set(ids) - {bobs, both}
    ratings = {job.id: job.transcript().rating for job in fetch(open_queue(connection), ids)}
    assert ratings == {bobs: None, both: 0.375, again: -1}, "bob's -1 is no longer made up for by mary's 1"
    assert again in look(connection, "bob").sources, "and is found when he is to be forgotten"
    assert producer.rate(one.key, 1, user="bob").outcome is Outcome.QUEUED
    assert user_digest("mary").encode() not in everything(connection)


def test_what_others_said_of_a_users_conversation_goes_too(connection: redis.Redis, producer: Producer) -> None:
    """Its text is the user's, whoever rated it."""
    one = recorded(connection, user="mary", messages=[{"role": "user", "content": "mary's secret"}])
    producer.rate(one.key, -1, user="bob")
    producer.rate(one.key, -1, user="eve")
    producer.correct(one.key, "Better.", user="bob")
    take_out(connection, look(connection, "mary"))
    assert queued(connection) == [] and b"secret" not in everything(connection)
    assert connection.exists(keys.said(one.key)) == 0


def test_after_the_record_expired_the_whole_waiting_rating_goes(connection: redis.Redis, producer: Producer) -> None:
    one = recorded(connection)
    producer.rate(one.key, 1, user="mary")
    producer.rate(one.key, 0.5, user="bob")
    connection.delete(keys.completion(one.key))
    take_out(connection, look(connection, "mary"))
    assert queued(connection) == []


def test_feedback_is_found_long_after_its_job_expired(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    one = recorded(connection)
    sent = producer.rate(one.key, 1, user="mary")
    drain(connection, weights)
    for name in connection.keys("rq:*") + connection.keys("completion*") + [keys.said(one.key)]:
        connection.delete(name)
    found = look(connection, "mary")
    assert found.trained == {sent.id: 1} and not found.stored
    take_out(connection, found, [sent.id])
    assert look(connection, "mary").trained == {sent.id: 1}, "it is in the weights still"
    take_out(connection, found)
    assert look(connection, "mary").nothing


def test_ratings_of_a_trained_round_are_forgotten_too(
    connection: redis.Redis, producer: Producer, weights: Remembering
) -> None:
    one = recorded(connection)
    producer.rate(one.key, 1, user="mary")
    drain(connection, weights)
    take_out(connection, look(connection, "mary"))
    assert user_digest("mary").encode() not in everything(connection)
    again = producer.rate(one.key, -1, user="bob")
    drain(connection, weights)
    assert again.outcome is Outcome.QUEUED and len(set(weights.trained)) == 2
    assert connection.pttl(keys.said(one.key)) > 0


def test_what_lies_about_in_redis_does_not_stop_it(connection: redis.Redis, producer: Producer) -> None:
    producer.enqueue(say("x"), id="a", meta={"user": "mary"})
    connection.hset("rq:job:b", "meta", b"\xc1\xff")
    connection.hset("rq:job:c", "meta", b"\x93\x01\x02\x03")
    connection.set("rq:job:d", "no hash")
    connection.hset(keys.FEEDBACK_USERS, "e", b"\xc1")
    connection.hset(keys.FEEDBACK_USERS, b"\xff", b"\x92\x01\x02")
    connection.zadd(keys.COMPLETIONS, {"x:y:z": 1, "a" * 22 + ":9": 2})
    assert look(connection, "mary").waiting == ["a"]


def test_who_rated_in_an_export_is_found(connection: redis.Redis, producer: Producer, redis_url: str) -> None:
    """By the file that `tandem enqueue` read; and each of several whom a transcript belongs to."""
    export = Path(__file__).parents[1] / "data" / "formats" / "openwebui.json"
    done = tandem("enqueue", str(export), url=redis_url)
    assert done.returncode == 0, done.stderr
    waiting = {raw.decode() for raw in connection.lrange("rq:queue:feedback", 0, -1)}
    found = look(connection, "u")
    assert set(found.waiting) == waiting and len(waiting) == 4
    take_out(connection, found)
    assert look(connection, "u").nothing and not connection.keys("rq:job:*")
    producer.enqueue(say("x"), id="a", meta={"user": ["mary", "bob", 7]})
    assert [look(connection, name).waiting for name in ("mary", "bob", "7", "mar")] == [["a"], ["a"], ["a"], []]


def test_nobody_is_found_by_a_part_of_a_name(connection: redis.Redis, producer: Producer) -> None:
    producer.enqueue(say("x"), id="a", meta={"user": "mary"})
    producer.rate(recorded(connection, user="mary").key, 1)
    for other in ("mar", "Mary", "mary ", "*", user_digest("mary")):
        assert look(connection, other).nothing
