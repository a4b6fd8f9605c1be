"""The control socket step by step: who may ask for what, what reaches the engine, and in which order.

The same against a real vLLM: tests/server/test_lease.py.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from control_parts import LocalServer
from patience import PATIENCE, until

from worker.serving import control_client
from worker.serving.cache_policy import KEEP, RECOMPUTE, CachePolicy
from worker.serving.control_client import ServerControl, ServerError, ServerGoneError, ServerTakenError, server_state
from worker.serving.protocol import MAX_REQUEST, MAX_ROW, TORN, TakenError
from worker.serving.vllm import control_server, engine
from worker.serving.vllm.worker_extension import TandemWorkerExtension
from worker.utils import unix_socket

PAUSED_CALLS = ["freeze", "is_paused", "tandem_synchronize"]
RECOMPUTED_CALLS = ["pause keep clear", "is_paused", "reset_prefix_cache", "tandem_synchronize"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(tmp_path / "run") as running:
        yield running


@pytest.fixture
def trainer(server: LocalServer) -> Iterator[ServerControl]:
    with ServerControl(server.run_dir, "first") as control:
        yield control


def torn(server: LocalServer) -> None:
    """A trainer dies in the middle of a write."""
    with ServerControl(server.run_dir, "victim") as control:
        control.pause()
        server.header.begin(control.fence)
    server.until(lambda state: state["state"] == TORN and state["trainer"] is None)


# What reaches the engine


def test_a_pause_and_a_resume_ask_the_engine_in_this_order(server: LocalServer, trainer: ServerControl) -> None:
    trainer.pause()
    assert server.engine.calls == PAUSED_CALLS
    trainer.resume(0)
    assert server.engine.calls == [*PAUSED_CALLS, "resume"]


def test_a_trainer_is_told_how_many_requests_run_and_counts_the_time_they_stand_still(
    server: LocalServer, trainer: ServerControl
) -> None:
    trainer.pause()
    trainer.resume(0)
    assert trainer.stood_s == 0 < trainer.paused_s
    assert trainer.state()["running"] == 0
    server.progress = {"a": 3, "b": 0}
    before = trainer.paused_s
    assert trainer.state()["running"] == 2
    trainer.pause()
    server.progress = {}  # they were given up meanwhile
    with pytest.raises(ServerError):
        trainer.resume(7)
    assert trainer.stood_s == 0, "it lasts on"
    trainer.resume(0)
    assert trainer.stood_s == pytest.approx(trainer.paused_s - before) and trainer.stood_s > 0


def test_what_a_pause_waits_for_while_the_server_serves_is_no_standing_still(tmp_path: Path) -> None:
    with (
        LocalServer(tmp_path / "run", CachePolicy(RECOMPUTE)) as server,
        ServerControl(server.run_dir, "first") as control,
    ):
        server.progress = {"a": 3}
        control.pause()
        control.resume(0)
        stood, started = control.stood_s, time.monotonic()
        with ThreadPoolExecutor(1) as other:
            pausing = other.submit(control.pause)
            until(server.control._turn.locked, "the pause is asked for, and held back")
            asked = server_state(server.run_dir)["recomputed_s"]
            recomputed = server.until(lambda state: state["recomputed_s"] > asked + 0.2)["recomputed_s"]
            server.progress["a"] += 1
            assert pausing.result() > 0.2
        control.resume(0)
        assert control.state()["recomputed_s"] >= recomputed > 0.2
        assert control.stood_s - stood < time.monotonic() - started - 0.2


def test_recomputing_drops_every_cached_state(tmp_path: Path) -> None:
    with (
        LocalServer(tmp_path / "run", CachePolicy(RECOMPUTE)) as server,
        ServerControl(server.run_dir, "first") as trainer,
    ):
        trainer.pause()
        assert server.engine.calls == RECOMPUTED_CALLS
        trainer.resume(0)


@pytest.mark.parametrize(
    ("call", "outcome", "reason"),
    [
        ("pause keep clear", RuntimeError("lost"), r"did not pause \(RuntimeError: lost\)"),
        ("is_paused", False, "reports that it is running"),
        ("reset_prefix_cache", False, "prefix cache could not be reset and holds states of the old weights"),
        ("tandem_synchronize", RuntimeError("no device"), "no device"),
    ],
)
def test_a_pause_that_is_none_is_refused_and_the_server_goes_on(
    tmp_path: Path, call: str, outcome: Any, reason: str
) -> None:
    with (
        LocalServer(tmp_path / "run", CachePolicy(RECOMPUTE)) as server,
        ServerControl(server.run_dir, "first") as trainer,
    ):
        server.engine.fail[call] = outcome
        with pytest.raises(ServerError, match=reason):
            trainer.pause()
        assert trainer.state()["state"] == "serving" and not server.engine.paused
        del server.engine.fail[call]
        trainer.pause()
        trainer.resume(0)


def test_an_engine_that_hangs_is_an_error_in_words(
    server: LocalServer, trainer: ServerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ENGINE_SECONDS", 0.1)
    server.engine.fail["is_paused"] = asyncio.sleep(60)
    with pytest.raises(ServerError, match=r"vLLM did not pause within 0\.1 s"):
        trainer.pause()
    assert trainer.state()["state"] == "serving"


def test_requests_run_again_only_once_the_server_knows_its_version(server: LocalServer, trainer: ServerControl) -> None:
    known = []
    server.engine.on["resume"] = lambda: known.append((server.state.version, server.state.condition))
    trainer.pause()
    server.header.begin(trainer.fence)
    server.header.finish(1)
    trainer.resume(1)
    assert known == [(1, "paused")]


def test_what_was_made_before_a_pause_is_handed_over_under_its_own_version(
    server: LocalServer, trainer: ServerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer has the weights at once; only the next version waits."""
    wait, frozen, versions = engine.Engine.handed_over, [], []

    async def watched(self: engine.Engine) -> None:
        await wait(self)
        assert time.monotonic() - frozen[0] >= engine.OUTPUT_SECONDS
        versions.append(server.state.version)

    monkeypatch.setattr(engine, "OUTPUT_SECONDS", 0.3)
    monkeypatch.setattr(engine.Engine, "handed_over", watched)
    server.engine.on["freeze"] = lambda: frozen.append(time.monotonic())
    trainer.pause()
    server.header.begin(trainer.fence)
    server.header.finish(1)
    assert not versions
    trainer.resume(1)
    assert versions == [0] and server.state.version == 1


def test_the_device_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    TandemWorkerExtension().tandem_synchronize()
    assert waited == [True]


# Out of order


def test_a_lease_is_given_once(server: LocalServer, trainer: ServerControl) -> None:
    trainer.pause()
    for ask in (trainer.pause, trainer.begin_hogwild):
        with pytest.raises(ServerError, match=r"paused already|not serving whole weights"):
            ask()
    trainer.resume(0)
    trainer.begin_hogwild()
    with pytest.raises(ServerError, match="not serving whole weights"):
        trainer.begin_hogwild()
    trainer.pause()
    trainer.resume(0)
    with pytest.raises(ServerError, match="not paused"):
        trainer.resume(0)


def test_resume_needs_the_headers_version_and_state(server: LocalServer, trainer: ServerControl) -> None:
    trainer.pause()
    with pytest.raises(ServerError, match="the header beside the weights says CLEAN, version 0"):
        trainer.resume(1)
    server.header.begin(trainer.fence)
    with pytest.raises(ServerError, match="the header beside the weights says APPLYING, version 0"):
        trainer.resume(0)
    assert trainer.state()["state"] == "paused" and server.engine.paused
    server.header.finish(1)
    trainer.resume(1)
    assert trainer.state()["version"] == 1


@pytest.mark.parametrize("left", ["CLEAN", "APPLYING"])
def test_hogwild_is_a_lease_too(server: LocalServer, left: str) -> None:
    with ServerControl(server.run_dir, "victim") as control:
        control.begin_hogwild()
        server.header.begin(control.fence)
        if left == "CLEAN":
            server.header.finish(1)
    state = server.until(lambda state: state["trainer"] is None and "written" not in state)
    assert state["state"] == ("serving" if left == "CLEAN" else TORN)
    if left == "CLEAN":
        assert state["version"] == 1 and server.engine.calls == [*PAUSED_CALLS, "resume"]
        return
    with ServerControl(server.run_dir, "next") as following:
        with pytest.raises(ServerError, match="not serving whole weights"):
            following.begin_hogwild()
        following.pause()
        server.header.finish(1)
        following.resume(1)


# Torn weights


def test_what_was_inside_when_the_weights_tore_is_ended_and_stays_out(server: LocalServer) -> None:
    server.state.in_flight = 1  # one waits for its answer
    torn(server)
    while "pause abort keep" not in server.engine.calls:
        server.run(asyncio.sleep(0.01))
    server.engine.calls.clear()
    with ServerControl(server.run_dir, "next") as following:  # it waits for nobody
        following.pause()
        assert server.engine.calls[:4] == ["pause abort keep", *RECOMPUTED_CALLS[:3]]
        assert following.state()["state"] == TORN
        with pytest.raises(ServerError, match="paused already"):
            following.pause()
        server.header.finish(1)
        following.resume(1)
        assert following.state()["state"] == "serving"
        server.engine.calls.clear()
    server.state.in_flight = 0
    server.run(asyncio.sleep(0.5))
    assert "pause abort keep" not in server.engine.calls, "nor is anybody ended once they are whole"


def test_a_trainer_that_only_looked_at_torn_weights_is_not_blamed(server: LocalServer) -> None:
    torn(server)
    reason = server_state(server.run_dir)["reason"]
    with ServerControl(server.run_dir, "next"):
        pass
    state = server.until(lambda state: state["trainer"] is None)
    assert (state["state"], state["reason"]) == (TORN, reason) and "'victim'" in reason


def test_an_engine_that_has_ended_is_said_and_final(server: LocalServer, trainer: ServerControl) -> None:
    server.engine.errored = True
    state = server.until(lambda state: state["state"] == TORN)
    assert "shutting down" in state["reason"]
    with pytest.raises(ServerError, match="shutting down"):
        trainer.pause()


# Scoring a row


def test_a_row_is_scored_by_the_engine_and_nothing_changes(server: LocalServer, trainer: ServerControl) -> None:
    before = trainer.state()
    assert trainer.score([5, 6, 7]) == [-6.0, -7.0]
    assert server.engine.calls == ["score [5, 6, 7]"] and trainer.state() == before


def test_a_row_has_bounds(server: LocalServer, trainer: ServerControl) -> None:
    bad: list[Any] = [None, [], [1], [1, -1], [1, True], [1, 2.0], ["1", "2"], [1] * (MAX_ROW + 1)]
    for ids in bad:
        with pytest.raises(ServerError, match=f"ids must be 2 to {MAX_ROW} token ids"):
            trainer._ask({"op": "score", "ids": ids})
    assert len(trainer.score([250_000] * MAX_ROW)) == MAX_ROW - 1  # the longest, of a large vocabulary, is let in
    assert len(server.engine.calls) == 1


def test_no_row_is_scored_while_the_server_stands_still(server: LocalServer, trainer: ServerControl) -> None:
    trainer.pause()
    with pytest.raises(ServerError, match="not serving whole weights"):
        trainer.score([1, 2])
    trainer.resume(0)
    assert trainer.score([1, 2]) == [-2.0]


def test_a_row_that_is_not_computed_in_time_is_told(
    server: LocalServer, trainer: ServerControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile others are answered: it waits behind requests, and not in front of anybody."""
    monkeypatch.setattr(control_server, "SCORE_SECONDS", 0.2)
    server.engine.fail["score [1, 2]"] = asyncio.sleep(60)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(trainer.score, [1, 2])
        until(lambda: "score [1, 2]" in server.engine.calls, "ask the engine")
        assert server_state(server.run_dir)["state"] == "serving"
        with pytest.raises(ServerError, match=r"was not computed within 0\.2 s: too many requests wait"):
            waiting.result()


# Who may ask


def test_only_the_first_that_says_hello_is_the_trainer(server: LocalServer, trainer: ServerControl) -> None:
    with pytest.raises(ServerError, match=r"trainer 'first' \(process \d+, since .*stop it first"):
        ServerControl(server.run_dir, "second").connect(leaving=0)
    with unix_socket.connect(str(server.run_dir / "control.sock")) as sock:
        for op in ("pause", "begin_hogwild", "renew", "resume", "score"):
            unix_socket.send(sock, {"op": op, "seconds": 1.0, "version": 0})
            assert unix_socket.receive(sock) == {"error": "say hello first"}
    assert trainer.state()["state"] == "serving" and server.engine.calls == []


@pytest.mark.parametrize("missing", ["running", "lost_prefix_tokens"])
def test_a_server_of_an_older_tandem_is_refused_in_a_sentence(server: LocalServer, missing: str) -> None:
    hello = server.control._ops["hello"]

    async def older(*asked: Any) -> Any:
        return {name: value for name, value in (await hello(*asked)).items() if name != missing}

    server.control._ops["hello"] = older
    with pytest.raises(ServerError, match=r"started by an older Tandem: start it again"):
        ServerControl(server.run_dir, "newer").connect()


def test_the_next_trainer_waits_for_one_that_is_going_away(server: LocalServer, trainer: ServerControl) -> None:
    refused: list[str] = []
    hello = server.control._ops["hello"]

    async def counted(*asked: Any) -> Any:
        try:
            return await hello(*asked)
        except TakenError as error:
            refused.append(str(error))
            raise

    server.control._ops["hello"] = counted
    second = ServerControl(server.run_dir, "second")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(second.connect, PATIENCE)
        until(lambda: refused, "the second has come too early")
        trainer.close()
        assert waiting.result()["trainer"]["name"] == "second"
    second.close()


def test_the_next_trainer_waits_for_what_a_killed_one_asked_for_last(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its pause waited for the engine's step: that is over before the server sees that it has gone."""
    over, clock = threading.Event(), [0.0]
    server.engine.fail["freeze"] = asyncio.to_thread(over.wait)
    with unix_socket.connect(str(server.run_dir / "control.sock"), PATIENCE) as killed:
        unix_socket.send(killed, {"op": "hello", "name": "killed"})
        assert "error" not in (unix_socket.receive(killed) or {})
        unix_socket.send(killed, {"op": "pause", "seconds": 1000.0})
        until(lambda: "freeze" in server.engine.calls, "ask the engine")
    monkeypatch.setattr(control_client, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    second = ServerControl(server.run_dir, "second")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(second.connect)
        until(lambda: server.control._connections == 2, "the second has come")
        clock[0] = 100.0
        over.set()
        assert waiting.result()["state"] == "serving"
    second.close()


def test_a_trainer_that_stays_is_named_after_a_while(server: LocalServer, trainer: ServerControl) -> None:
    with pytest.raises(ServerTakenError, match=r"trainer 'first' .*stop it first \(it was given 0\.3 s to go\)"):
        ServerControl(server.run_dir, "second").connect(leaving=0.3)


def test_a_request_that_is_too_long_costs_its_sender_the_connection(server: LocalServer) -> None:
    with unix_socket.connect(str(server.run_dir / "control.sock")) as sock:
        unix_socket.send(sock, {"op": "hello", "name": "x" * MAX_REQUEST})
        answer = unix_socket.receive(sock)
        assert answer is not None and f"over the limit of {MAX_REQUEST}" in answer["error"]
        with contextlib.suppress(unix_socket.WireError):
            assert unix_socket.receive(sock) is None


def test_connections_have_an_end(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "MAX_CONNECTIONS", 2)
    path = str(server.run_dir / "control.sock")
    with unix_socket.connect(path) as one, unix_socket.connect(path) as two, unix_socket.connect(path) as three:
        for sock in (one, two):
            unix_socket.send(sock, {"op": "state"})
            assert "version" in (unix_socket.receive(sock) or {})
        assert "more than 2 connections" in (unix_socket.receive(three) or {})["error"]


def test_a_process_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    near, theirs = socket.socketpair()
    with near, theirs:
        assert unix_socket.check_peer(near) == os.getpid()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(unix_socket.WireError, match=r"under uid \d+, not ours \(12345\)"):
            unix_socket.check_peer(near)


def test_a_client_without_a_server_says_what_to_do(server: LocalServer, trainer: ServerControl) -> None:
    trainer.close()
    with pytest.raises(ServerGoneError, match="not connected"):
        trainer.pause()


def test_policies() -> None:
    assert CachePolicy().running == KEEP, "what these tests take for the default"
