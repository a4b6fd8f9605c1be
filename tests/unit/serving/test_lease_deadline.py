"""A trainer that hangs: the server takes its lease back, and it finds out before it writes.

The protocol between client, server and header, with an engine that only counts. With real processes and SIGSTOP:
end_to_end/test_hung_worker.py.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from control_parts import LocalServer

from worker.serving import control_client
from worker.serving.control_client import ServerControl, ServerError
from worker.serving.protocol import LEAST_LEASE, LONGEST_LEASE, PLANNED_SECONDS, lease_seconds
from worker.serving.vllm import lease as lease_module
from worker.shared_weights.header import APPLYING, CLEAN, HEADER_BYTES, Header, HeaderError, LeaseLostError
from worker.shared_weights.weights_client import read_header

SHORT, LONG = 0.05, 3600.0
"""Seconds of a lease: over before anybody looks, and never over."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(tmp_path / "run") as running:
        yield running


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the client asks for: `lease.seconds`, whatever was planned."""

    class Asked:
        seconds = LONG

    asked = Asked()
    monkeypatch.setattr(control_client, "lease_seconds", lambda planned: asked.seconds)
    return asked


@pytest.fixture
def trainer(server: LocalServer, lease: Any) -> Iterator[ServerControl]:
    with ServerControl(server.run_dir, "hung") as control:
        yield control


def take(trainer: ServerControl, way: str) -> None:
    trainer.pause() if way == "pause" else trainer.begin_hogwild()


def taken_back(server: LocalServer) -> dict[str, Any]:
    """The state, once the server has taken its weights back and serves."""
    return server.until(
        lambda state: server.header.fence == 1 and state["state"] == "serving" and "written" not in state
    )


@pytest.mark.parametrize("way", ["pause", "hogwild"])
def test_clean_weights_go_on_and_their_late_trainer_can_do_nothing(
    server: LocalServer, trainer: ServerControl, lease: Any, way: str
) -> None:
    lease.seconds = SHORT
    take(trainer, way)
    state = taken_back(server)
    assert "reason" not in state and not server.engine.paused
    with pytest.raises(LeaseLostError, match="nothing was written"):
        server.header.begin(trainer.fence)
    assert server.header.fields() == {"lineage": "b" * 32, "version": 0, "state": CLEAN, "fence": 1}
    for ask in (trainer.pause, trainer.renew, lambda: trainer.resume(0), trainer.begin_hogwild):
        with pytest.raises(ServerError, match=r"trainer 'hung' .*silent for longer than its lease of 0\.05 s.*start"):
            ask()
    assert trainer.state()["state"] == "serving", "it may still look"
    assert not server.engine.paused


def test_nobody_else_gets_in_while_a_late_trainer_lives(
    server: LocalServer, trainer: ServerControl, lease: Any
) -> None:
    lease.seconds = SHORT
    trainer.pause()
    taken_back(server)
    with pytest.raises(ServerError, match=r"trainer 'hung' .*it hangs; end it with kill -9 \d+"):
        ServerControl(server.run_dir, "next").connect(leaving=0)
    trainer.close()
    server.until(lambda state: state["trainer"] is None)
    lease.seconds = LONG
    with ServerControl(server.run_dir, "next") as following:
        following.pause()
        assert following.fence == 1
        server.header.begin(following.fence)
        server.header.finish(1)
        following.resume(1)
    assert server.state.version == 1


@pytest.mark.parametrize("way", ["pause", "hogwild"])
def test_half_written_weights_answer_nobody_until_their_late_trainer_finishes(
    server: LocalServer, trainer: ServerControl, lease: Any, way: str
) -> None:
    take(trainer, way)
    server.header.begin(trainer.fence)
    lease.seconds = SHORT
    trainer.renew()
    state = server.until(lambda state: state["state"] == "torn")
    assert "half written: trainer 'hung'" in state["reason"] and "version 1" in state["reason"]
    assert "silent for longer than its lease of 0.05 s" in state["reason"] and "kill -9" in state["reason"]
    with pytest.raises(ServerError, match="it hangs; end it with kill -9"):
        ServerControl(server.run_dir, "next").connect(leaving=0)
    lease.seconds = LONG
    server.header.finish(1)  # it has woken up
    if way == "hogwild":
        trainer.pause()
    trainer.resume(1)
    state = server.until(lambda state: state["state"] == "serving")
    assert (state["version"], server.engine.paused) == (1, False) and "reason" not in state
    trainer.pause()  # it is the trainer as before
    server.header.begin(trainer.fence)
    server.header.finish(2)
    trainer.resume(2)


@pytest.mark.parametrize("way", ["pause", "hogwild"])
@pytest.mark.parametrize("left", [CLEAN, APPLYING])
def test_a_late_trainer_that_dies_leaves_what_the_header_says(
    server: LocalServer, trainer: ServerControl, lease: Any, way: str, left: str
) -> None:
    take(trainer, way)
    server.header.begin(trainer.fence)
    lease.seconds = SHORT
    trainer.renew()
    server.until(lambda state: state["state"] == "torn")
    if left == CLEAN:
        server.header.finish(1)
    trainer.close()
    state = server.until(lambda state: state["trainer"] is None)
    if left == CLEAN:
        state = server.until(lambda state: state["state"] == "serving")
        assert (state["version"], server.engine.paused) == (1, False)
        return
    assert state["state"] == "torn" and "version 1" in state["reason"]
    lease.seconds = LONG
    with ServerControl(server.run_dir, "next") as following:  # restores them
        following.pause()
        server.header.finish(1)
        following.resume(1)
        assert following.state()["state"] == "serving"


def test_a_trainer_that_renews_keeps_its_lease(server: LocalServer, trainer: ServerControl, lease: Any) -> None:
    lease.seconds = 1.0
    trainer.pause()
    lease.seconds = LONG
    trainer.renew()
    server.run(asyncio.sleep(1.5))
    assert (trainer.state()["state"], server.header.fence) == ("paused", 0)
    server.header.begin(trainer.fence)
    server.header.finish(1)
    trainer.resume(1)


def test_a_lease_that_was_given_back_does_not_end_the_next(
    server: LocalServer, trainer: ServerControl, lease: Any
) -> None:
    lease.seconds = 1.0
    trainer.pause()
    trainer.resume(0)
    lease.seconds = LONG
    trainer.pause()
    server.run(asyncio.sleep(1.5))
    assert (trainer.state()["state"], server.header.fence) == ("paused", 0)
    trainer.resume(0)
    with pytest.raises(ServerError, match="no lease"):
        trainer.renew()


def test_a_deadline_that_falls_into_the_resume_comes_to_nothing(
    server: LocalServer, trainer: ServerControl, lease: Any
) -> None:
    lease.seconds = 1.0
    trainer.pause()
    server.before_header = lambda: time.sleep(1.5)
    trainer.resume(0)
    server.before_header = lambda: None
    server.run(asyncio.sleep(0.3))  # what the deadline began would show by now
    assert (trainer.state()["state"], server.header.fence) == ("serving", 0)
    trainer.pause()
    trainer.resume(0)


@pytest.mark.parametrize("seconds", [None, 0, -1.0, float("nan"), float("inf"), 2 * LONGEST_LEASE, "3", True])
def test_a_lease_without_a_length_is_refused(
    server: LocalServer, trainer: ServerControl, lease: Any, seconds: Any
) -> None:
    lease.seconds = seconds
    for ask in (trainer.pause, trainer.begin_hogwild):
        with pytest.raises(ServerError, match="seconds must be a number above 0"):
            ask()
    assert trainer.state()["state"] == "serving"


def test_a_lease_is_several_times_as_long_as_planned() -> None:
    assert lease_seconds(0.01) == LEAST_LEASE
    assert lease_seconds(30) == 300
    assert lease_seconds(1e9) == LONGEST_LEASE


def test_a_write_that_is_known_to_be_long_has_a_longer_lease(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[float] = []
    monkeypatch.setattr(control_client, "lease_seconds", lambda seconds: planned.append(seconds) or LONG)
    with ServerControl(server.run_dir, "slow") as trainer:
        for take in (trainer.pause, trainer.begin_hogwild):
            for at_least in (100.0, 0.1):
                take(at_least=at_least)
                if take == trainer.begin_hogwild:
                    trainer.pause(1.0)
                trainer.resume(0)
    assert planned == [100.0, PLANNED_SECONDS, 100.0, 1.0, PLANNED_SECONDS, 1.0]


def test_weights_that_nobody_can_judge_answer_nobody(server: LocalServer, trainer: ServerControl, lease: Any) -> None:
    lease.seconds = SHORT
    server.service.close()  # as when vLLM's worker process has died
    with pytest.raises(ServerError, match=r"weights\.sock"):
        trainer.pause()
    assert trainer.state()["state"] == "serving" and not server.engine.paused


class Interleaved(Header):
    """One side's view of the header, with all that the other side does (`other`) before its access number `at`."""

    def __init__(self, tensor: torch.Tensor, at: int, other: Callable[[], None]) -> None:
        super().__init__(tensor)
        self.at, self.other, self.counted = at, other, 0

    def _count(self) -> None:
        self.counted += 1
        if self.counted - 1 == self.at:
            self.other()

    def fields(self) -> dict[str, str | int]:
        self._count()
        return super().fields()

    def _put(self, word: int, value: int) -> None:
        self._count()
        super()._put(word, value)


class Race:
    """A trainer that begins, and a server that takes its lease back, on one header; what each of them came to."""

    def __init__(self) -> None:
        self.memory = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        Header(self.memory).adopt("b" * 32, 7)
        self.began: bool | None = None
        self.seen = ""

    def begin(self, header: Header) -> None:
        try:
            header.begin(0)
            self.began = True
        except LeaseLostError:
            self.began = False
            assert Header(self.memory).fields() == {"lineage": "b" * 32, "version": 7, "state": CLEAN, "fence": 1}

    def revoke(self, header: Header) -> None:
        self.seen = str(header.revoke()["state"])


@pytest.mark.parametrize("stopped", ["trainer", "server"])
def test_wherever_one_was_stopped_nobody_writes_weights_that_the_server_believes_whole(stopped: str) -> None:
    outcomes = set()
    for at in range(12):
        race = Race()
        plain = Header(race.memory)
        if stopped == "trainer":
            race.begin(Interleaved(race.memory, at, lambda race=race, plain=plain: race.revoke(plain)))
        else:
            race.revoke(Interleaved(race.memory, at, lambda race=race, plain=plain: race.begin(plain)))
        if race.began is None:  # the other was done before
            race.begin(plain)
        if not race.seen:
            race.revoke(plain)
        assert not (race.began and race.seen == CLEAN), at
        outcomes.add((race.began, race.seen))
    assert {(False, CLEAN), (True, APPLYING)} <= outcomes
    assert stopped == "server" or (False, APPLYING) in outcomes, "it may also find out just after the server has looked"


def test_begin_is_refused_on_torn_weights_whatever_the_fence() -> None:
    memory = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
    header = Header(memory)
    header.adopt("b" * 32, 0)
    header.begin(0)
    for fence in (0, 1):
        with pytest.raises(HeaderError, match="torn"):
            header.begin(fence)
    assert header.state == APPLYING


def test_an_engine_process_that_does_not_answer_costs_a_pause_and_no_more(
    server: LocalServer, trainer: ServerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    server.before_header = lambda: answers.wait(60) and None
    monkeypatch.setattr(lease_module, "read_header", lambda run_dir: read_header(run_dir, 0.2))
    with pytest.raises(ServerError, match=r"did not say what state its weights are in: no answer within 0\.2 s"):
        trainer.pause()
    assert trainer.state()["state"] == "serving" and server.engine.calls == []

    monkeypatch.setattr(lease_module, "read_header", read_header)
    threading.Timer(0.5, answers.set).start()
    trainer.pause()  # a late answer is an answer
    assert trainer.state()["state"] == "paused"
    trainer.resume(0)
