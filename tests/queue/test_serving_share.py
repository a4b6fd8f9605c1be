"""The share of the time that serving keeps: what is said of it in Redis, and a worker that rests for it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from click.testing import CliRunner
from durable_parts import LEARNING, QUIET, Site
from patience import until

from producer import keys
from producer.errors import TandemError
from worker.cli.status import line
from worker.cli.worker import command as worker_command
from worker.config.hyperparameters import Hyperparameters
from worker.config.update_options import ApplySettings, apply_settings_of
from worker.operations.status import gather
from worker.orchestrator.serving_cost import ServingCost
from worker.orchestrator.session import open_session
from worker.serving.vllm.lost_prefixes import LEAST_BLOCK
from worker.trainer.device_time import PROMPT, DeviceTime
from worker.utils.serving_budget import ServingBudget
from worker.versions import share_status


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def said(connection: redis.Redis) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in connection.hgetall(keys.STATE).items()}


def test_a_rest_is_said_and_ends_when_it_is_paid_or_the_worker_stops(redis_url: str) -> None:
    connection, clock = redis.Redis.from_url(redis_url), Clock()
    budget = ServingBudget(0.9, clock)
    connection.hset(keys.STATE, mapping={share_status.UNTIL: time.time() + 1000, share_status.FORMER: 0.1})
    share_status.start(connection, budget)
    assert said(connection) == {"serving_share": "0.9", "serving_charges": "{}"}
    assert share_status.seconds_left(said(connection)) == 0
    budget.charge(9)
    looks: list[float] = []

    def look() -> None:
        looks.append(budget.left())
        clock.now += 30
        if len(looks) == 2:
            budget.charge(6)  # known only now

    share_status.rest(connection, budget, stopping=lambda: False, look=look, poll=0)
    assert looks == pytest.approx([90, 60, 90, 60, 30]), "what is charged meanwhile is paid as well"
    assert 60 < share_status.seconds_left(said(connection)) <= 90
    budget.charge(9)
    share_status.rest(connection, budget, stopping=lambda: len(looks) == 6, look=look, poll=0)
    assert len(looks) == 6 and budget.left() == pytest.approx(60)


def test_the_last_minute_is_true_at_whatever_moment_it_is_read(redis_url: str) -> None:
    connection, clock = redis.Redis.from_url(redis_url), Clock()
    budget = ServingBudget(0.5, clock)
    budget.charge(3)
    clock.now += 30
    budget.charge(1.5)
    budget.charge(1.5)
    share_status.tell(connection, budget)
    state = said(connection)
    assert share_status.kept(state) == pytest.approx(0.9)
    charges = {int(second): seconds for second, seconds in json.loads(state["serving_charges"]).items()}
    assert sorted(charges.values()) == [3, 3] and max(charges) - min(charges) in (30, 31)
    hour_ago = {"serving_charges": json.dumps({second - 3600: seconds for second, seconds in charges.items()})}
    assert share_status.kept(hour_ago) == 1, "nobody has to tell that nothing was trained since"
    for broken in ("", "3", "[1]", '{"x": 1}', '{"1": "x"}'):
        assert share_status.kept({"serving_charges": broken}) in (None, 1)
    assert share_status.kept({}) is None


def settings(*arguments: str) -> ApplySettings:
    """As `tandem worker` understands `arguments`."""
    context = worker_command.make_context("worker", list(arguments))
    names = ("apply", "hogwild", "serving_share", "duty_cycle", "memory", "graphs")
    return apply_settings_of({name: context.params[name] for name in names})


def options(*arguments: str) -> float:
    """--serving-share of them."""
    return settings(*arguments).serving_share


def test_graphs_can_be_switched_off() -> None:
    assert settings().graphs == "auto"
    assert settings("--graphs", "off").graphs == "off"


def test_the_former_flag_means_the_rest_of_the_time() -> None:
    assert options() == 0.9
    assert options("--serving-share", "0") == 0
    assert options("--duty-cycle", "0.25") == 0.75
    assert options("--duty-cycle", "1") == 0
    with pytest.raises(TandemError, match="former name of --serving-share"):
        options("--duty-cycle", "0.25", "--serving-share", "0.75")
    assert "--duty-cycle" not in CliRunner().invoke(worker_command, ["--help"]).output


@pytest.fixture
def busy_site(tiny_model: Path, tmp_path: Path) -> Iterator[Site]:
    """Its server says that two requests run, always."""
    running = Site(tmp_path, tiny_model, requests=2)
    yield running
    running.close()


def test_a_worker_rests_after_the_commit_until_what_it_took_is_paid_or_it_is_stopped(busy_site: Site) -> None:
    """The rest is far longer than the test: only the signal can end it."""
    site = busy_site
    site.send("x", 4)
    worker = site.start("worker", "--max-jobs", "2", *LEARNING, *QUIET, "--serving-share", "0.9999")
    until(lambda: site.redis.hget(keys.STATE, share_status.UNTIL) is not None, "the worker rests")
    assert site.producer.version() == 1 and len(site.ledger()) == 2
    found = gather(site.store.url, site.run_dir)
    manifest = site.manifest(1)
    cost = float(manifest["serving_cost_s"])
    assert float(manifest["sweep_s"]) < cost <= float(manifest["step_s"])
    assert manifest["running_requests"] == "2"
    assert found["worker"]["state"] == "resting" and found["worker"]["serving_share"] == 0.9999
    assert found["worker"]["rest_s"] > 0.4 * 10_000 * cost, "all but what has passed since"
    assert found["worker"]["serving_kept"] <= 1 - cost / 60 + 0.001
    said_of_it = line(found)
    assert "worker resting" in said_of_it and "% of the last minute, asked for 99.99 %" in said_of_it
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.ended() == 0, worker.said()
    assert site.producer.version() == 1 and time.time() < float(site.redis.hget(keys.STATE, share_status.UNTIL))
    site.work(*QUIET, "--serving-share", "0")
    assert site.agree() == 2 and site.redis.hget(keys.STATE, share_status.UNTIL) is None


def test_what_computes_beside_requests_is_charged_its_cpu_time_over_the_cores(busy_site: Site) -> None:
    cores, h = len(os.sched_getaffinity(0)), Hyperparameters(lr=3e-4, max_length=512)
    with open_session(busy_site.run_dir, "test", h, state_dir=busy_site.state) as session:
        cost, before = ServingCost(session, ServingBudget(0.9)), time.process_time()
        with cost.computing():
            end = time.process_time() + 0.5
            while time.process_time() < end:
                pass
            time.sleep(0.5)  # a trainer that waits takes nothing
        assert cost.requests == 2
        charged = cost.budget.total
        assert 0.5 / cores <= charged <= (time.process_time() - before) / cores
        needed, before = DeviceTime(), time.process_time()
        with cost.computing(needed):
            needed.forward(30)
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
        assert 0.1 / cores <= cost.budget.total - charged <= (time.process_time() - before) / cores
        assert needed.seconds() == pytest.approx(cost.budget.total - charged), "what a token takes is learnt"


def test_on_a_gpu_what_computes_is_charged_what_the_device_needs(
    busy_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes is more: the trainer and the server take turns."""
    h = Hyperparameters(lr=3e-4, max_length=512)
    with open_session(busy_site.run_dir, "test", h, state_dir=busy_site.state) as session:
        monkeypatch.setattr(session.trainer, "device", torch.device("cuda", 0))
        cost, needed = ServingCost(session, ServingBudget(0.9)), DeviceTime()
        with cost.computing(needed):  # before the warm-up has said what a token takes
            needed.forward(300)
            time.sleep(0.05)
        charged = cost.budget.total
        assert 0.05 <= charged < 5
        needed.learn(tokens=100, seconds=0.001)
        with cost.computing(needed):
            time.sleep(0.05)
        assert cost.budget.total - charged == pytest.approx(0.001)


def test_prompts_that_an_update_makes_a_server_compute_again_are_charged_by_their_tokens(busy_site: Site) -> None:
    h = Hyperparameters(lr=3e-4, max_length=512)
    with open_session(busy_site.run_dir, "test", h, state_dir=busy_site.state) as session:

        def stand_still() -> None:
            session.control.pause()
            session.control.resume(session.weights.header.version)

        cost = ServingCost(session, ServingBudget(0.9))
        stand_still()
        cost.look()
        stand_still()
        cost.look()
        assert session.check()["lost_prefix_tokens"] == 2 * LEAST_BLOCK
        assert cost.budget.total == 0, "before the first step nobody knows what a token takes"
        session.trainer.device_time.learn(tokens=1, seconds=0.5)
        stand_still()
        for _ in range(2):
            cost.look()
            assert cost.budget.total == pytest.approx(2 * LEAST_BLOCK * 0.5 * PROMPT), "once"


def test_what_a_version_took_and_was_known_later_is_in_the_next_manifest_and_no_debt_of_the_next(
    busy_site: Site,
) -> None:
    h = Hyperparameters(lr=3e-4, max_length=512)
    with open_session(busy_site.run_dir, "test", h, state_dir=busy_site.state) as session:
        session.trainer.device_time.learn(tokens=1, seconds=0.5)
        clock, lost = Clock(), 2 * LEAST_BLOCK * 0.5 * PROMPT
        cost, told = ServingCost(session, ServingBudget(0.9, clock)), []
        for _ in range(3):
            clock.now += 1000
            cost.begin()
            cost.look()
            assert cost.budget.left() == 0, "of the version before, in time that has passed"
            session.control.pause()
            session.control.resume(session.weights.header.version)
            told.append(cost.take()["serving_cost_s"])
        cost.look()
        assert told == pytest.approx([0, 0, lost]) and cost.budget.total == pytest.approx(2 * lost)
        assert cost.take()["serving_cost_s"] == pytest.approx(lost)


def test_without_running_requests_no_version_costs_or_waits(tiny_model: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, tiny_model)
    try:
        site.send("x", 6)
        site.work(*QUIET, "--serving-share", "0.999999")
        assert site.agree() == 3
        assert [float(site.manifest(version)["serving_cost_s"]) for version in (1, 2, 3)] == [0, 0, 0]
        assert site.redis.hget(keys.STATE, share_status.UNTIL) is None
        assert share_status.kept(said(site.redis)) == 1
    finally:
        site.close()
