"""Two versions on the same conversations: paired differences and their intervals."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.operations.evaluation.comparison import ComparisonError, compare
from worker.versions.evaluations import Score

score = st.builds(Score, st.floats(0, 100), st.integers(1, 50), st.none() | st.booleans(), st.none() | st.floats(-5, 5))
several = st.lists(score, min_size=1, max_size=12)


def pairs() -> st.SearchStrategy[tuple[list[Score], list[Score]]]:
    """Before and after of the same conversations."""

    def after(before: list[Score]) -> st.SearchStrategy[list[Score]]:
        changed = [st.builds(lambda nll, one=one: replace(one, nll=nll), st.floats(0, 100)) for one in before]
        return st.tuples(*changed).map(list)

    return several.flatmap(lambda before: st.tuples(st.just(before), after(before)))


def test_a_known_difference() -> None:
    before = [Score(4.0, 2, False), Score(2.0, 2, False), Score(6.0, 4, True)]
    after = [Score(2.0, 2, True), Score(2.0, 2, False), Score(4.0, 4, True)]
    found = compare(before, after)
    assert (found.loss.before, found.loss.after, found.loss.change) == (12 / 8, 1.0, -0.5)
    assert found.exact is not None and found.exact.change == pytest.approx(1 / 3) and found.exact.count == 3
    assert found.won is None and (found.better, found.worse) == (2, 0)
    assert found.loss.low == -1.0 and found.loss.high == 0.0  # three conversations: the draws reach the extremes


def test_pairs_that_all_change_alike_leave_no_doubt() -> None:
    """An interval of unpaired means would be as wide as the conversations differ."""
    before = [Score(float(hard), 1) for hard in range(1, 100)]
    found = compare(before, [replace(one, nll=one.nll - 0.5) for one in before])
    assert found.loss.low == pytest.approx(-0.5) and found.loss.high == pytest.approx(-0.5)


@given(pairs())
def test_intervals_hold_the_change_the_other_way_round_mirrored(both: tuple[list[Score], list[Score]]) -> None:
    before, after = both
    there, back = compare(before, after), compare(after, before)
    assert there.loss.change == pytest.approx(-back.loss.change) and there.better == back.worse
    if there.loss.low is None or there.loss.high is None or back.loss.low is None:
        assert len(before) == 1
        return
    assert there.loss.low <= there.loss.high and there.loss.low == pytest.approx(-(back.loss.high or 0), abs=1e-9)
    least = min(b.loss - a.loss for a, b in zip(before, after, strict=True))
    assert there.loss.low >= least - 1e-9


@given(several)
def test_the_same_scores_differ_in_nothing(scores: list[Score]) -> None:
    found = compare(scores, scores)
    for one in (found.loss, found.exact, found.won):
        assert one is None or (one.change, one.low or 0.0, one.high or 0.0) == (0.0, 0.0, 0.0)
    assert (found.better, found.worse) == (0, 0)


def test_other_conversations_are_refused() -> None:
    for other in ([Score(1.0, 3)], [Score(1.0, 2), Score(1.0, 2)]):
        with pytest.raises(ComparisonError, match="different conversations"):
            compare([Score(1.0, 2)], other)
