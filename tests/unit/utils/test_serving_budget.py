"""What updates may take from serving, by a clock of the test's own."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.errors import TandemError
from worker.utils.serving_budget import CREDIT, MINUTE, ServingBudget


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Versions of one budget; `taken` holds, of each, when it began and what it was charged."""

    def __init__(self, share: float) -> None:
        self.clock = Clock()
        self.budget = ServingBudget(share, self.clock)
        self.taken: list[tuple[float, float]] = []
        self.later = 0.0

    def version(self, charge: float, *, lasts: float = 0.0, later: float = 0.0) -> float:
        """One, as soon as it may begin; the seconds that it had to wait. later: charged after its end."""
        waited = self.budget.left()
        self.clock.now += waited
        assert self.budget.left() < 1e-9
        self.taken.append((self.clock.now, charge + later))
        self.budget.begin()
        self.clock.now += lasts
        self.budget.charge(charge)
        assert self.budget.take() == pytest.approx(self.later + charge)
        self.budget.charge(later)
        self.later = later
        return waited

    def in_the_minute_from(self, start: float) -> float:
        return sum(charge for began, charge in self.taken if start <= began <= start + MINUTE)


@given(
    share=st.sampled_from([0.01, 0.5, 0.9, 0.99]),
    versions=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 3.0, 20.0, 1000.0]),  # nothing to train
            st.floats(0, 3),  # charge
            st.sampled_from([0.0, 0.2, 5.0]),  # how long it is made
            st.floats(0, 1),  # charged when it was made
        ),
        max_size=60,
    ),
)
def test_no_minute_takes_more_than_its_budget(share: float, versions: list[tuple[float, float, float, float]]) -> None:
    run = Run(share)
    for idle, charge, lasts, later in versions:
        run.clock.now += idle
        run.version(charge, lasts=lasts, later=later)
    largest = max((charge for _, charge in run.taken), default=0.0)
    for began, _ in run.taken:
        assert run.in_the_minute_from(began) <= (1 - share) * (MINUTE + CREDIT) + largest + 1e-6


@pytest.mark.parametrize(("share", "apart"), [(0.9, 10.0), (0.5, 2.0), (0.99, 100.0)])
def test_a_queue_that_is_never_empty_leaves_the_share_from_the_first_minute(share: float, apart: float) -> None:
    run = Run(share)
    waits = [run.version(1.0, lasts=0.25) for _ in range(100)]
    assert waits[0] == 0, "the first version owes nothing"
    assert waits[1:] == pytest.approx([apart - 0.25] * 99)
    for began, _ in run.taken:
        assert run.in_the_minute_from(began) <= (1 - share) * MINUTE + 1.0 + 1e-6


def test_arrivals_by_a_clock_wait_for_nothing_within_the_credit() -> None:
    run = Run(0.9)
    run.clock.now += 60
    for jitter in (0.0, 2.4, -2.4, 1.0, -1.0, 2.4, -2.4):
        run.clock.now += 3 + jitter
        assert run.version(0.27) == 0


def test_a_long_rest_is_no_more_credit_than_a_short_one() -> None:
    waits = []
    for idle in (CREDIT, 10_000.0):
        run = Run(0.9)
        run.clock.now += idle
        waits.append([run.version(1.0) for _ in range(3)])
    assert waits[0] == pytest.approx([0, 10 - CREDIT, 10])
    assert waits[1] == pytest.approx(waits[0])


@pytest.mark.parametrize(("share", "charge"), [(0.0, 1000.0), (0.9, 0.0), (0.999999, 0.0)])
def test_who_asks_for_nothing_and_who_takes_nothing_never_waits(share: float, charge: float) -> None:
    run = Run(share)
    assert [run.version(charge, lasts=0.1) for _ in range(50)] == [0] * 50


def test_the_last_minute_is_that_of_the_charges() -> None:
    run = Run(0.5)
    recent: Callable[[], list[tuple[float, float]]] = run.budget.recent
    run.version(0.5, lasts=70.0)  # it began more than a minute ago, and what it took it took now
    assert recent() == [(0.0, 0.5)]
    run.clock.now += 20
    run.version(0.25)
    run.clock.now += 30
    assert recent() == [(50.0, 0.5), (30.0, 0.25)] and run.budget.total == 0.75
    run.clock.now += 10
    assert recent() == [(40.0, 0.25)]
    run.clock.now += 100
    assert recent() == []


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_that_leaves_nothing_for_updates_is_refused(share: float) -> None:
    with pytest.raises(TandemError, match="--serving-share"):
        ServingBudget(share)
