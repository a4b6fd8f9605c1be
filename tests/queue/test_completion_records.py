"""Records of completions in a real Redis: kept once, for a time, within a bound of bytes."""

import asyncio
import threading

import pytest
import redis
import redis.asyncio
from completion_parts import completion
from patience import until

from producer import keys
from producer.completions import OVERHEAD, Completion, Kept, load, load_async, new_key, remove, save, save_async
from producer.errors import UnknownCompletionError

HOUR = 3600.0
ROOM = 1 << 20


def charge(one: Completion) -> int:
    return len(one.pack()) + OVERHEAD


def bytes_kept(connection: redis.Redis) -> int:
    return int(connection.get(keys.COMPLETION_BYTES) or 0)


def records(connection: redis.Redis) -> set[str]:
    return {name.decode().removeprefix("completion:") for name in connection.keys("completion:*")}


def indexed(connection: redis.Redis) -> list[str]:
    return [entry.decode().partition(":")[0] for entry in connection.zrange(keys.COMPLETIONS, 0, -1)]


def millisecond(connection: redis.Redis) -> int:
    seconds, micros = connection.time()
    return seconds * 1000 + micros // 1000


def test_a_record_comes_back_as_it_was_and_expires(connection: redis.Redis) -> None:
    one = completion()
    assert save(connection, one, HOUR, ROOM) is Kept.KEPT
    assert load(connection, one.key) == one
    assert HOUR - 60 < connection.ttl(keys.completion(one.key)) <= HOUR
    assert bytes_kept(connection) == charge(one) and indexed(connection) == [one.key]


def test_the_same_from_an_event_loop(redis_url: str, connection: redis.Redis) -> None:
    async def everything() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        one = completion()
        assert await save_async(client, one, HOUR, ROOM) is Kept.KEPT
        assert await save_async(client, one, HOUR, ROOM) is Kept.KNOWN
        assert await load_async(client, one.key) == one == load(connection, one.key)
        with pytest.raises(UnknownCompletionError):
            await load_async(client, new_key())
        await client.aclose()

    asyncio.run(everything())


def test_a_record_is_never_overwritten(connection: redis.Redis) -> None:
    first = completion()
    save(connection, first, HOUR, ROOM)
    before = connection.ttl(keys.completion(first.key))
    other = completion(key=first.key, id="chosen-by-somebody", user="other", token_ids=[], logprobs=None)
    assert save(connection, other, 10 * HOUR, ROOM) is Kept.KNOWN
    assert load(connection, first.key) == first and connection.ttl(keys.completion(first.key)) <= before
    assert bytes_kept(connection) == charge(first)


@pytest.mark.parametrize("key", ["", "chatcmpl-7", "*", "a" * 22, "a" * 21 + "\n", None, 7])
def test_nothing_but_a_key_that_was_given_out_finds_a_record(connection: redis.Redis, key: str) -> None:
    save(connection, completion(), HOUR, ROOM)
    with pytest.raises(UnknownCompletionError, match="no completion is recorded under this key"):
        load(connection, key)


def test_the_oldest_make_room(connection: redis.Redis) -> None:
    made = [completion() for _ in range(5)]
    for one in made:
        assert save(connection, one, HOUR, 3 * charge(one)) is Kept.KEPT
        now = millisecond(connection)
        until(lambda now=now: millisecond(connection) > now, "the next millisecond")  # no two in the same
    left = {one.key for one in made[2:]}
    assert records(connection) == left == set(indexed(connection))
    assert bytes_kept(connection) == 3 * charge(made[0])


def test_one_that_is_larger_than_all_may_be_is_not_kept_and_drives_nothing_out(connection: redis.Redis) -> None:
    small = completion()
    save(connection, small, HOUR, ROOM)
    large = completion(messages=[{"role": "user", "content": "x" * ROOM}])
    assert save(connection, large, HOUR, ROOM) is Kept.TOO_LARGE
    assert records(connection) == {small.key} and bytes_kept(connection) == charge(small)


def test_what_expired_is_counted_no_more(connection: redis.Redis) -> None:
    gone, last = completion(), completion()
    save(connection, gone, 0.05, ROOM)
    until(lambda: not connection.exists(keys.completion(gone.key)), "the record expires")
    assert bytes_kept(connection) == charge(gone)
    save(connection, last, HOUR, ROOM)
    assert bytes_kept(connection) == charge(last) and indexed(connection) == [last.key]


def test_a_lost_index_does_not_shrink_the_room_for_ever(connection: redis.Redis) -> None:
    connection.set(keys.COMPLETION_BYTES, ROOM)
    one = completion()
    assert save(connection, one, HOUR, 2 * charge(one)) is Kept.KEPT
    assert bytes_kept(connection) == charge(one)


SUMS = [b"-1000000000000", b"1000000000000", b"12.5", b"nan", b"inf", b"-inf", b"1e400", b"much", b""]


@pytest.mark.parametrize("planted", [*SUMS, "list"], ids=str)
def test_a_sum_that_cannot_be_right_is_counted_again(connection: redis.Redis, planted: bytes | str) -> None:
    """It neither lifts the bound nor drives records out nor stops the next."""
    made = [completion() for _ in range(4)]
    most = 3 * charge(made[0])
    for one in made[:2]:
        save(connection, one, HOUR, most)
    connection.delete(keys.COMPLETION_BYTES)
    if isinstance(planted, bytes):
        connection.set(keys.COMPLETION_BYTES, planted)
    else:
        connection.rpush(keys.COMPLETION_BYTES, "a")
    assert save(connection, made[2], HOUR, most) is Kept.KEPT
    assert len(records(connection)) == 3 and bytes_kept(connection) == most
    assert save(connection, made[3], HOUR, most) is Kept.KEPT
    assert len(records(connection)) == 3 and bytes_kept(connection) == most


def test_a_sum_that_could_be_right_is_counted_again_when_asked(connection: redis.Redis) -> None:
    made = [completion() for _ in range(6)]
    most = 3 * charge(made[0])
    for one in made[:3]:
        save(connection, one, HOUR, most)
    connection.set(keys.COMPLETION_BYTES, 0)
    for one in made[3:5]:
        save(connection, one, HOUR, most)
    assert len(records(connection)) == 5, "somebody lifted the bound"
    save(connection, made[5], HOUR, most, recount=True)
    assert len(records(connection)) == 3 and bytes_kept(connection) == most


def test_an_index_of_another_type_is_begun_anew(connection: redis.Redis) -> None:
    connection.rpush(keys.COMPLETIONS, "a")
    one = completion()
    assert save(connection, one, HOUR, ROOM) is Kept.KEPT and indexed(connection) == [one.key]


@pytest.mark.parametrize("planted", ["much", "12.5"])
def test_a_planted_sum_stops_no_removal(connection: redis.Redis, planted: str) -> None:
    one = completion()
    save(connection, one, HOUR, ROOM)
    connection.set(keys.COMPLETION_BYTES, planted)
    assert remove(connection, one.key) and records(connection) == set() and indexed(connection) == []


def test_many_savers_at_once_stay_within_the_bound(redis_url: str, connection: redis.Redis) -> None:
    most = 20 * charge(completion())
    start = threading.Barrier(8)

    def run() -> None:
        client = redis.Redis.from_url(redis_url)
        start.wait()
        for _ in range(25):
            save(client, completion(), HOUR, most)
        client.close()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(connection)) == 20 and records(connection) == set(indexed(connection))
    assert (
        bytes_kept(connection)
        == most
        == sum(connection.strlen(keys.completion(key)) + OVERHEAD for key in records(connection))
    )


def test_a_full_redis_says_so_and_keeps_the_books(connection: redis.Redis) -> None:
    one = completion()
    save(connection, one, HOUR, ROOM)
    before = connection.config_get("maxmemory")["maxmemory"]
    connection.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.ResponseError):
            save(connection, completion(), HOUR, ROOM)
    finally:
        connection.config_set("maxmemory", before)
    assert records(connection) == {one.key} and bytes_kept(connection) == charge(one)


def test_what_is_no_record_is_refused_and_not_quoted(connection: redis.Redis) -> None:
    secret = "the patient said something private"
    for plant in (lambda name: connection.set(name, secret), lambda name: connection.hset(name, "a", secret)):
        key = new_key()
        plant(keys.completion(key))
        with pytest.raises(UnknownCompletionError) as caught:
            load(connection, key)
        assert "private" not in str(caught.value)
