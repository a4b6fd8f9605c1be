"""What users said so far: the mean of a round, and that whatever lies in Redis is read as something well-formed."""

import math

import msgpack
import pytest
from completion_parts import plain
from hypothesis import given
from hypothesis import strategies as st

from producer.errors import InvalidTranscriptError
from producer.opinions import Opinion, Source
from producer.said import DIGEST, MAX_SIZE, MAX_USERS, Said, digest, user_digest

names = st.sampled_from(["", user_digest("a"), user_digest("b"), user_digest("c")])
numbers = st.sampled_from([1.0, -1.0, 0.5, -0.5, 0.0]) | st.floats(-1, 1)


@given(st.lists(st.tuples(names, numbers), max_size=12))
def test_the_rating_is_the_mean_of_each_users_last(votes: list[tuple[str, float]]) -> None:
    said = Said()
    for user, number in votes:
        said.vote(user, number)
    last = [number for number in dict(votes).values() if number]
    mean = sum(last) / len(last) if last else 0.0
    assert said.rating is None if abs(mean) < 1e-7 else math.isclose(said.rating or 0.0, mean, abs_tol=2e-6)
    assert Said.unpack(said.pack()) == said


@given(
    st.binary(max_size=80)
    | st.lists(plain, max_size=6).map(lambda value: msgpack.packb(value, default=str))
    | st.none()
)
def test_anything_that_is_read_is_well_formed(raw: bytes | None) -> None:
    check(raw)


parts = st.tuples(
    st.integers(0, 2) | plain,
    st.integers(-1, 2**40) | plain,
    st.dictionaries(names | st.text(max_size=3), numbers | plain, max_size=3) | plain,
    st.booleans() | plain,
    st.dictionaries(names.map("comment:{}".format) | st.text(max_size=3), plain, max_size=3) | plain,
)


@given(parts)
def test_what_nearly_is_what_was_said_is_read_or_nothing(value: tuple[object, ...]) -> None:
    try:
        raw = msgpack.packb(value)
    except (OverflowError, ValueError):
        return
    check(raw)


def test_all_that_may_be_said_fits_what_is_read() -> None:
    users = [user_digest(f"u{at}") for at in range(MAX_USERS)]
    texts = {f"correction:{user}": (2**31 - 1, digest(user)) for user in users}
    full = Said(2**31 - 1, dict.fromkeys(users, -0.1), True, texts)
    assert len(full.pack()) < MAX_SIZE and Said.unpack(full.pack()) == full
    assert Said.unpack(Said(texts={"x:": (0, "x")}).pack()).texts
    assert Said.unpack(Said(texts={f"{'x' * MAX_SIZE}:": (0, "x")}).pack()) == Said()


def check(raw: bytes | None) -> None:
    said = Said.unpack(raw)
    assert said.rating is None or -1 <= said.rating <= 1
    assert all(DIGEST.fullmatch(user) for user in said.votes) and said.round >= 0
    assert Said.unpack(said.pack()) == said
    said.vote("", 1.0)
    said.set_text("comment", "", 1, "x")
    said.forget("")
    Source.unpack(raw or b"")


def test_users_are_bounded_and_a_known_one_may_change_its_mind() -> None:
    said = Said(votes={user_digest(str(number)): 1.0 for number in range(MAX_USERS)})
    said.vote(user_digest("0"), -1.0)
    with pytest.raises(InvalidTranscriptError, match="1,000 users gave a rating of this answer already"):
        said.vote(user_digest("new"), 1.0)
    assert len(Said.unpack(said.pack()).votes) == MAX_USERS


def test_digests_keep_their_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") and user_digest(None) == user_digest("") == ""
    assert DIGEST.fullmatch(user_digest("mary")) and user_digest("mary") != user_digest("Mary")


def test_an_opinion_shows_nothing_of_itself() -> None:
    shown = repr(Opinion.correction("private", "mary"))
    assert "private" not in shown and "mary" not in shown and user_digest("mary") not in shown
