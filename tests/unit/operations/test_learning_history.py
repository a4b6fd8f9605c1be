"""What Redis says of versions, read whatever it says."""

import math

import pytest
import redis
from page_parts import HOSTILE, SCRIPT, plant, plant_hostile

from producer import keys
from worker.operations import history


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_versions_come_newest_first_with_their_numbers_and_what_happened(connection: redis.Redis) -> None:
    plant(connection, 45, rollback=20)
    found = history.read(connection, 30)
    assert found.newest == 45 and [one.number for one in found.versions] == list(range(45, 15, -1))
    newest = found.versions[0]
    assert newest.whole and newest.job_count == 2 and newest.lists["jobs"] == ("chat-45-0", "chat-45-1")
    assert newest.kinds["liked"].jobs == 1 and newest.at is not None and newest.tokens_per_second
    assert [one.kind for one in found.happenings if one.kind != "canary"] == ["resumed", "held"]
    looks = {one.version: one.passed for one in found.happenings if one.kind == "canary"}
    assert looks == {10: True, 20: True, 30: True, 40: False}
    assert found.gone == {16, 17, 18, 19}


def test_a_page_further_back_knows_of_rollbacks_after_it(connection: redis.Redis) -> None:
    plant(connection, 30, rollback=20)
    assert history.read(connection, 3, newest=18).gone == {16, 17, 18, 19}
    assert history.read(connection, 3, newest=15).versions[0].number == 15


def test_a_version_whose_manifest_was_trimmed_has_its_headline(connection: redis.Redis) -> None:
    plant(connection, 5)
    connection.delete(keys.manifest(2))
    trimmed = history.read(connection, 10).versions[3]
    assert (trimmed.number, trimmed.whole, trimmed.job_count) == (2, False, 3)
    assert trimmed.numbers["loss"] > 0 and not trimmed.lists and trimmed.at is not None


def test_an_empty_redis_has_no_history(connection: redis.Redis) -> None:
    assert history.read(connection) == history.History()


def test_never_more_than_the_most_is_read(connection: redis.Redis) -> None:
    plant(connection, 3)
    connection.set(keys.VERSION, 10**6)
    connection.hset(keys.manifest(10**6), "kind", "update")
    sent = connection.info("commandstats").get("cmdstat_hmget", {}).get("calls", 0)
    found = history.read(connection, 10**9)
    asked = connection.info("commandstats")["cmdstat_hmget"]["calls"] - sent
    assert found.newest == 10**6 and len(found.versions) == 1 and asked == history.MOST


def test_hostile_manifests_are_read_as_far_as_they_make_sense(connection: redis.Redis) -> None:
    last = plant_hostile(connection)
    found = history.read(connection, 60)
    by_number = {one.number: one for one in found.versions}
    assert found.newest == last and set(by_number) == set(range(1, len(HOSTILE)))
    first = by_number[1]
    assert first.words["kind"] == SCRIPT and first.at is None and not first.numbers, "text is no number"
    assert math.isnan(by_number[2].numbers["loss"]) and math.isinf(by_number[2].numbers["tokens"])
    assert by_number[3].target is None and by_number[4].target is None
    assert max(map(len, by_number[5].lists["jobs"])) == history.MAX_WORD
    assert by_number[6].kinds[SCRIPT[:40]].jobs == 2**53 and "liked" not in by_number[6].kinds
    assert not by_number[7].kinds and "jobs" not in by_number[7].lists and by_number[7].tokens_per_second is None
    assert "jobs" not in by_number[8].lists and "reason" not in by_number[8].words, "too long to be fetched"
    assert {one.kind for one in found.happenings} == {SCRIPT, "held", "canary"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1970-01-01T00:01:00Z", 60.0), ("1970-01-01T00:01:00", 60.0), ("yesterday", None), ("", None), (None, None)],
)
def test_a_time_is_utc_unless_it_says_otherwise(text: str | None, seconds: float | None) -> None:
    assert history.as_time(text) == seconds


def test_a_rollback_of_a_rollback_brings_its_versions_back_in(connection: redis.Redis) -> None:
    # 5 went back to 2; 6 is 4 again: it takes 5 out, and what 5 took out of the weights is in them through 6.
    assert history.rolled_back([(6, 4), (5, 2)]) == {5}
    assert history.rolled_back([(9, 7), (5, 2)]) == {8, 3, 4}
