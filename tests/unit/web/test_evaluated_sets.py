"""Named sets on the page: only like is compared with like."""

import json
from pathlib import Path

import pytest
import redis
from page_parts import LINEAGE, SCRIPT, plant

from producer import keys
from worker.versions.evaluations import Evaluation, Score, evaluation, keep
from worker.web.app import make_app
from worker.web.evaluated_sets import EvaluatedSet


def found(
    version: int, loss: float, *, digest: str = "d", lineage: str = LINEAGE, name: str = "canary.v1"
) -> Evaluation:
    scores = [Score(10 * loss, 10, exact=version > 1, margin=loss - 1), Score(10 * loss, 10, exact=False)]
    return evaluation(name, version, lineage, digest, scores, "live")


def test_the_newest_is_compared_with_the_first_of_the_same_conversations_and_lineage() -> None:
    stored = [found(1, 9.0, digest="other"), found(2, 2.0), found(5, 1.5), found(9, 0.1, lineage="b" * 32)]
    told = EvaluatedSet.of(stored, LINEAGE)
    assert (told.newest.version, told.first and told.first.version, told.live) == (5, 2, True)
    assert told.rows[0] == ("Loss", "2", "1.500", "−0.5000")
    assert told.rows[1] == ("Exact match", "50 %", "50 %", "±0 points")
    assert told.rows[2] == ("Win rate", "100 %", "100 %", "±0 points")
    assert [chart.id for chart in told.charts(False)] == [
        "set-canary_46v1-set-Loss", "set-canary_46v1-set-Exact_32match", "set-canary_46v1-set-Win_32rate",
    ]  # fmt: skip
    assert not EvaluatedSet.of(stored, "c" * 32).live


def test_a_set_that_was_evaluated_once_has_figures_and_no_change() -> None:
    told = EvaluatedSet.of([found(3, 2.0)], LINEAGE)
    assert told.first is None and told.rows[0] == ("Loss", "", "2", "")


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_the_page_shows_sets_and_leaves_out_what_is_none(
    connection: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    client = make_app(redis_url, run_dir=tmp_path).test_client()
    where = {"base_url": "http://127.0.0.1"}
    assert "tandem eval" in client.get("/learning/evaluations", **where).get_data(as_text=True)
    plant(connection, 6)
    for version, loss in ((1, 2.0), (3, 1.75), (6, 1.25)):
        keep(connection, found(version, loss))
    hostile = {"name": SCRIPT, "version": 1, "lineage": SCRIPT, "loss": "nan", "at": SCRIPT, "format": 1}
    connection.hset(keys.evaluation("canary.v1"), "7:x", json.dumps(hostile))
    connection.zadd(keys.EVALUATIONS, {SCRIPT: 1, "empty": 2})
    odd = vars(found(6, 1.0, name="odd")) | {"at": SCRIPT, "where": SCRIPT, "loss": 1e300, "format": 1}
    connection.hset(keys.evaluation("odd"), f"6:{LINEAGE}", json.dumps(odd))
    connection.zadd(keys.EVALUATIONS, {"odd": 3})
    for path in ("/learning/evaluations", "/learning/evaluations?x=time"):
        answer = client.get(path, **where)
        text = answer.get_data(as_text=True)
        assert answer.status_code == 200 and "<script>alert" not in text
        assert "canary.v1" in text and "−0.7500" in text and text.count('<svg class="chart') >= 3 and "odd" in text
    connection.delete(keys.EVALUATIONS)
    connection.set(keys.EVALUATIONS, "x")
    assert client.get("/learning/evaluations", **where).status_code == 503
