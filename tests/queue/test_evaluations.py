"""What evaluations found is kept in Redis: by set, version and lineage, bounded, and as figures alone."""

import json
import math
from dataclasses import replace

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from producer import keys
from worker.versions import evaluations
from worker.versions.evaluations import EvaluationError, Score, evaluation

A, B = "a" * 32, "b" * 32
SCORES = [Score(3.0, 2, True), Score(1.0, 2, False, 0.25), Score(4.0, 4, None, -0.5)]


def one(version: int = 1, lineage: str = A, name: str = "facts") -> evaluations.Evaluation:
    return evaluation(name, version, lineage, "d1", SCORES, "live")


def test_figures_are_means_over_tokens_answers_and_pairs() -> None:
    found = one()
    assert (found.loss, found.conversations, found.tokens) == (1.0, 3, 8)
    assert (found.exact_match, found.win_rate) == (1 / 2, 1 / 2)
    assert (found.asked, found.exact, found.pairs, found.won) == (2, 1, 2, 1)
    bare = evaluation("facts", 1, A, "d1", [Score(1.0, 1)], "offline")
    assert bare.exact_match is None and bare.win_rate is None
    assert Score(1.0, 1, margin=0.0).won is False  # as likely is not likelier


def test_what_is_kept_is_found_under_its_version_and_lineage_alone(connection: redis.Redis) -> None:
    kept = {(version, lineage): one(version, lineage) for version in (1, 2) for lineage in (A, B)}
    kept[2, B] = replace(kept[2, B], loss=9.0)
    for found in kept.values():
        evaluations.keep(connection, found, SCORES)
    for (version, lineage), found in kept.items():
        assert evaluations.find(connection, "facts", version, lineage) == found
        assert evaluations.scores(connection, found) == SCORES
    assert evaluations.find(connection, "facts", 3, A) is None
    assert evaluations.find(connection, "other", 1, A) is None
    assert [(each.version, each.lineage) for each in evaluations.of_set(connection, "facts")] == list(kept)
    assert evaluations.latest(connection, B) == [kept[2, B]]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 65])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(EvaluationError, match="cannot be the name of a set"):
        evaluations.checked_name(name)


HUGE = "9" * 400


@pytest.mark.parametrize(
    "field, value", [("loss", HUGE), ("exact", HUGE), ("tokens", HUGE), ("asked", "-1"), ("digest", "[" * 100_000)]
)
def test_what_nobody_here_wrote_counts_as_not_there(connection: redis.Redis, field: str, value: str) -> None:
    plain = json.dumps({"format": evaluations.FORMAT, **vars(one()), field: "PLANTED"}).replace('"PLANTED"', value)
    connection.hset(keys.evaluation("facts"), one().of, plain)
    connection.zadd(keys.EVALUATIONS, {"facts": 1})
    assert evaluations.latest(connection) == [] and evaluations.find(connection, "facts", 1, A) is None


def test_reading_is_bounded_whatever_lies_there_and_a_new_evaluation_takes_its_place(connection: redis.Redis) -> None:
    connection.zadd(keys.EVALUATIONS, {f"set-{i}": i for i in range(100)})
    assert evaluations.names(connection) == sorted(f"set-{i}" for i in range(100 - evaluations.SETS, 100))
    connection.hset(keys.evaluation("facts"), mapping={f"{i}:x": "{}" for i in range(evaluations.MANY + 1)})
    assert evaluations.of_set(connection, "facts") == []
    evaluations.keep(connection, one(), SCORES)
    assert [found.of for found in evaluations.of_set(connection, "facts")] == [one().of]
    assert connection.hlen(keys.evaluation("facts")) == 1


def test_a_second_evaluation_of_a_version_takes_the_place_of_the_first(connection: redis.Redis) -> None:
    evaluations.keep(connection, one(), SCORES)
    again = replace(one(), digest="d2", conversations=2)
    evaluations.keep(connection, again, SCORES[:2])
    assert evaluations.of_set(connection, "facts") == [again]
    assert evaluations.scores(connection, again) == SCORES[:2]


def test_sets_and_versions_are_bounded_and_the_earliest_evaluated_go(connection: redis.Redis) -> None:
    for version in range(evaluations.VERSIONS + 3):
        evaluations.keep(connection, replace(one(version), at=f"2026-01-01T00:{version // 60:02d}:{version % 60:02d}"))
    versions = [found.version for found in evaluations.of_set(connection, "facts")]
    assert versions == list(range(3, evaluations.VERSIONS + 3))
    assert connection.hlen(keys.evaluation_scores("facts")) == evaluations.VERSIONS
    for number in range(evaluations.SETS):
        evaluations.keep(connection, one(name=f"set{number}"), SCORES)
    assert evaluations.names(connection) == sorted(f"set{number}" for number in range(evaluations.SETS))
    assert not connection.exists(keys.evaluation("facts"), keys.evaluation_scores("facts"))


def test_the_scores_of_a_large_set_are_not_kept(connection: redis.Redis) -> None:
    many = [Score(1.0, 1)] * (evaluations.SCORES + 1)
    small, large = one(), replace(one(), conversations=len(many))
    evaluations.keep(connection, small, SCORES)
    evaluations.keep(connection, large, many)
    assert evaluations.find(connection, "facts", 1, A) == large
    assert evaluations.scores(connection, large) is None


@pytest.mark.parametrize(
    "raw", ["", "no json", "[]", "null", '{"format": 2}', '{"format": 1}', '{"format": 1, "x": 2}']
)
def test_what_is_not_of_ours_counts_as_not_there(connection: redis.Redis, raw: str) -> None:
    evaluations.keep(connection, one(), SCORES)
    connection.hset(keys.evaluation("facts"), mapping={f"7:{A}": raw, b"\xff": raw})
    assert evaluations.find(connection, "facts", 7, A) is None
    assert [found.version for found in evaluations.of_set(connection, "facts")] == [1]
    connection.hset(keys.evaluation_scores("facts"), one().of, raw)
    assert evaluations.scores(connection, one()) is None


@pytest.mark.parametrize(
    "planted", [{"loss": math.nan}, {"exact": "1"}, {"version": True}, {"at": None}, {"name": "other"}, {"format": 9}]
)
def test_a_planted_figure_of_another_kind_counts_as_not_there(
    connection: redis.Redis, planted: dict[str, object]
) -> None:
    evaluations.keep(connection, one(), SCORES)
    stored = json.loads(connection.hget(keys.evaluation("facts"), one().of))  # type: ignore[arg-type]
    connection.hset(keys.evaluation("facts"), one().of, json.dumps(stored | planted))
    assert evaluations.find(connection, "facts", 1, A) is None


@pytest.mark.parametrize("name", ["", "a b", "a:b", "x" * 65, "a\n", "ä"])
def test_a_set_that_cannot_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(EvaluationError, match="cannot be the name of a set"):
        one(name=name)


def test_no_conversations_and_broken_weights_are_refused() -> None:
    with pytest.raises(EvaluationError, match="holds no conversations"):
        evaluation("facts", 1, A, "d1", [], "live")
    with pytest.raises(EvaluationError, match="version 3 is not finite"):
        evaluation("facts", 3, A, "d1", [Score(math.inf, 1)], "live")


figure = st.floats(0, 1e6).map(lambda value: round(value, evaluations.DIGITS))
score = st.builds(
    Score, figure, st.integers(1, 10**6), st.none() | st.booleans(), st.none() | figure | figure.map(lambda x: -x)
)


@given(st.lists(score, min_size=1, max_size=20))
def test_scores_and_figures_come_back_as_they_were(each: list[Score]) -> None:
    found = evaluation("facts", 1, A, "d1", each, "live")
    assert found.loss == pytest.approx(sum(one.nll for one in each) / found.tokens)
    assert evaluations._read(found.of, json.dumps({"format": 1} | evaluations.asdict(found)), "facts") == found
    assert [Score(*plain) for plain in json.loads(json.dumps([evaluations._plain(one) for one in each]))] == each
