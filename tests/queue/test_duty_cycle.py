"""The duty cycle: the rest that is owed, by a clock of the test's own, and a worker that keeps it."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from durable_parts import LEARNING, QUIET, Site
from patience import until

from producer import keys
from producer.errors import TandemError
from worker.cli import status
from worker.utils.duty_cycle import Duty
from worker.versions import rest_status


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, duty: Duty, seconds: float) -> None:
        with duty.work():
            self.now += seconds


@pytest.mark.parametrize(("part", "owed"), [(1.0, 0.0), (0.5, 8.0), (0.25, 24.0), (0.8, 2.0)])
def test_work_owes_a_rest_in_proportion(part: float, owed: float) -> None:
    clock = Clock()
    duty = Duty(part, clock)
    assert duty.left() == 0
    clock.work(duty, 8)
    assert duty.left() == pytest.approx(owed)
    clock.now += owed / 2
    assert duty.left() == pytest.approx(owed / 2), "time without work is rest, whatever it passed with"
    clock.now += 1000
    assert duty.left() == 0
    clock.work(duty, 8)
    assert duty.left() == pytest.approx(owed), "a long rest is no credit"


def test_work_that_comes_before_the_rest_is_over_adds_to_it() -> None:
    clock = Clock()
    duty = Duty(0.5, clock)
    clock.work(duty, 4)
    clock.now += 1
    clock.work(duty, 2)
    assert duty.left() == pytest.approx(5)


def test_work_that_fails_is_work() -> None:
    clock = Clock()
    duty = Duty(0.5, clock)
    with pytest.raises(ZeroDivisionError), duty.work():
        clock.now += 3
        raise ZeroDivisionError
    assert duty.left() == pytest.approx(3)


@pytest.mark.parametrize("part", [0.0, -1.0, 1.1])
def test_a_part_that_is_none_is_refused(part: float) -> None:
    with pytest.raises(TandemError, match="--duty-cycle"):
        Duty(part)


def test_a_rest_is_said_and_ends_when_it_is_over_or_the_worker_stops(redis_url: str) -> None:
    connection, clock = redis.Redis.from_url(redis_url), Clock()
    duty = Duty(0.1, clock)
    clock.work(duty, 10)
    looks = []

    def look() -> None:
        looks.append(duty.left())
        clock.now += 30

    rest_status.rest(connection, duty, stopping=lambda: False, check=look, poll=0)
    assert looks == pytest.approx([90, 60, 30])
    said = {name.decode(): value.decode() for name, value in connection.hgetall(keys.STATE).items()}
    assert said[rest_status.PART] == "0.1" and 0 < rest_status.seconds_left(said) <= 90
    clock.work(duty, 10)
    rest_status.rest(connection, duty, stopping=lambda: len(looks) == 4, check=look, poll=0)
    assert len(looks) == 4 and duty.left() == pytest.approx(60)
    rest_status.forget_rest(connection)
    assert connection.hgetall(keys.STATE) == {}


@pytest.fixture
def site(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    running = Site(tmp_path, tiny_model)
    yield running
    running.close()


def test_a_worker_rests_after_the_commit_and_before_the_next_batch_until_it_is_stopped(site: Site) -> None:
    """The rest is far longer than the test: only the signal can end it."""
    site.send("x", 4)
    worker = site.start("worker", "--max-jobs", "2", *LEARNING, *QUIET, "--duty-cycle", "0.0001")
    until(lambda: site.redis.hget(keys.STATE, rest_status.UNTIL) is not None, "the worker rests")
    assert site.producer.version() == 1 and len(site.ledger()) == 2
    found = status.gather(site.store.url, site.run_dir)
    step_s = float(site.manifest(1)["step_s"])
    assert found["worker"]["state"] == "resting" and found["worker"]["duty_cycle"] == "0.0001"
    assert found["worker"]["rest_s"] > 0.4 * 9999 * step_s, "all but what has passed since"
    assert "worker resting" in status.line(found)
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.ended() == 0, worker.said()
    assert site.producer.version() == 1 and time.time() < float(site.redis.hget(keys.STATE, rest_status.UNTIL))
    site.work(*QUIET)
    assert site.agree() == 2 and site.redis.hget(keys.STATE, rest_status.PART) is None
