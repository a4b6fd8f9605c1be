"""Processes of ranks: they compute together; what one of them alone fails at ends all, and is said by name."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from patience import PATIENCE, until
from rank_child import OtherError, total

from producer.errors import TandemError
from worker.distributed import waiting
from worker.distributed.device_watch import DeviceWatch
from worker.distributed.errors import GroupLostError
from worker.distributed.rank_processes import RankProcesses
from worker.distributed.rank_watch import Other, RankWatch

PROGRAM = str(Path(__file__).parents[2] / "helpers" / "rank_child.py")


@pytest.fixture
def ranks() -> Iterator[RankProcesses]:
    made = RankProcesses([sys.executable, PROGRAM], 2, PATIENCE)
    yield made
    made.close()


def refuse() -> NoReturn:
    raise OtherError("as it is everywhere")


def broken() -> NoReturn:
    raise MemoryError("no room here")


def test_they_sum_raise_alike_and_say_who_was_lost(ranks: RankProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of-replicas")  # which meet on a network: ranks do not
    with pytest.raises(GroupLostError, match="not started"):
        ranks.tell({"op": "sum"})
    ranks.start({})
    assert ranks.together({"op": "sum"}, total) == 2 and ranks.ended() is None
    with pytest.raises(OtherError):
        ranks.together({"op": "raise", "name": "OtherError"}, refuse)
    assert ranks.together({"op": "sum"}, total) == 2, "what all raise ends nobody"
    with pytest.raises(GroupLostError, match=r"rank 1 \(process \d+\) was killed by signal 9"):
        ranks.together({"op": "die"}, total)
    assert ranks.ended() is not None and not ranks.others
    ranks.start({})  # and again
    assert ranks.together({"op": "sum"}, total) == 2
    with pytest.raises(GroupLostError, match=r"rank 1 .* said that all is well, and rank 0 OtherError"):
        ranks.together({"op": "nothing"}, refuse)


def waited_in_vain() -> NoReturn:
    raise RuntimeError(
        "[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"
    )  # as gloo says


def test_who_is_waited_for_in_vain_is_named_and_ended(ranks: RankProcesses, tmp_path: Path) -> None:
    ranks.start({})
    hangs = ranks.others[0].process
    named = rf"^rank 1 \(process {hangs.pid}\) did not answer within 600 s, and was ended"
    with pytest.raises(GroupLostError, match=named):
        ranks.together({"op": "wait", "for": str(tmp_path / "never"), "sum": False}, waited_in_vain)
    assert hangs.poll() is not None


class Told:
    """Who was waited for, as a watch that looks twenty times a second tells it."""

    def __init__(self, ranks: RankProcesses, stopped_seconds: float, then: Callable[[], object] = lambda: None) -> None:
        self.ranks, self.then, self.heard = ranks, then, list[list[int]]()
        ranks.watch = RankWatch(self, 0.05, stopped_seconds)

    def __call__(self, others: Sequence[Other], since: float) -> None:
        self.heard.append([other.rank for other in others])
        if others:
            self.then()

    def heard_of(self, rank: int) -> bool:
        return self.heard[0] == [rank] and self.heard[-1] == []


def test_one_that_is_stopped_is_named_and_ended_long_before_one_that_is_slow(
    ranks: RankProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.distributed.rank_watch.SHOWN_SECONDS", 0.2)
    ranks.start({})
    pid, alone = ranks.others[0].process.pid, lambda: None
    for in_sum in (True, False):  # where rank 0 waits: in a sum, or for the answer
        told = Told(ranks, 0.5, (tmp_path / f"on-{in_sum}").touch)
        ranks.together({"op": "wait", "for": str(tmp_path / f"on-{in_sum}"), "sum": in_sum}, total if in_sum else alone)
        assert told.heard_of(1) and ranks.ended() is None, "a slow one is told, and nothing else"
    told = Told(ranks, PATIENCE, lambda: os.kill(pid, signal.SIGCONT))
    ranks.together({"op": "hang"}, alone)
    assert told.heard_of(1), "one that is woken goes on"
    for work in (total, alone):
        told, pid = Told(ranks, 0.5), ranks.others[0].process.pid
        with pytest.raises(GroupLostError, match=rf"^rank 1 \(process {pid}\) was stopped for 0.5 s, and was ended$"):
            ranks.together({"op": "hang"}, work)
        assert told.heard_of(1)
        ranks.start({})
    assert ranks.together({"op": "sum"}, total) == 2


def test_sums_on_a_device_are_given_up_when_a_process_is_gone_and_waited_for_while_none_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No connection ends there: the device waits. Whether rank 0's thread computes says nothing."""
    monkeypatch.setattr("worker.distributed.rank_watch.SHOWN_SECONDS", 0.2)
    heard, given_up = list[list[int]](), threading.Event()
    sums = DeviceWatch(PATIENCE, given_up.set, pace=0.01)
    watch = RankWatch(lambda others, since: heard.append([other.rank for other in others]), 0.05, device=sums)
    here, there = socket.socketpair()
    with here, there, subprocess.Popen(["sleep", "1000"]) as process:
        with watch.over([Other(1, process, here)]):
            assert not given_up.wait(0.5) and not heard
            sums.began(lambda: False)
            until(lambda: heard == [[1]], "it is waited for")
            assert not given_up.is_set()
            process.kill()
            until(given_up.is_set, "the sum is given up")
        sums.close()
    assert heard[-1] == [] and sums.failed


def test_one_that_is_stopped_while_it_starts_is_ended_too(ranks: RankProcesses) -> None:
    ranks.command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    told = Told(ranks, 0.5)
    with pytest.raises(GroupLostError, match=r"^rank 1 \(process \d+\) was stopped for 0.5 s, and was ended$"):
        ranks.start({})
    assert told.heard_of(1)


def test_who_is_waited_for_is_read_as_long_as_both_are_there(tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        other = Other(1, subprocess.Popen(["sleep", "1000"]), here)
        pid = other.process.pid
        waiting.tell(tmp_path, [other], time.time() - 40)
        until(lambda: waiting.read(tmp_path)[0].doing == "sleeps", "it sleeps")
        (found,) = waiting.read(tmp_path)
        assert (found.rank, found.pid) == (1, pid) and found.seconds >= 40
        os.kill(pid, signal.SIGSTOP)
        until(lambda: waiting.read(tmp_path)[0].doing == "is stopped", "it is stopped")
        other.process.kill()
        other.process.wait()
        assert waiting.read(tmp_path) == []
        waiting.tell(tmp_path, [], 0)
        assert list(tmp_path.iterdir()) == []
    waiting.tell(tmp_path / "nowhere", [other], time.time())  # a full disk ends no watch
    for nonsense in ("", "[]", '{"by": 1}', '{"by": 1, "since": "x", "ranks": [[1]]}'):
        (tmp_path / waiting.NAME).write_text(nonsense)
        assert waiting.read(tmp_path) == []


def test_a_rank_that_still_starts_is_not_ended_by_a_ctrl_c_to_all() -> None:
    program = f"""import os, signal, sys
for asked in (signal.SIGINT, signal.SIGTERM):
    os.kill(os.getpid(), asked)
os.execv(sys.executable, [sys.executable, {PROGRAM!r}, *sys.argv[-2:]])"""
    ranks = RankProcesses([sys.executable, "-c", program], 2, PATIENCE)
    try:
        ranks.start({})
        assert ranks.together({"op": "sum"}, total) == 2
    finally:
        ranks.close()


@pytest.mark.slow
def test_what_one_alone_fails_at_is_said(ranks: RankProcesses) -> None:
    with pytest.raises(GroupLostError, match=r"rank 1 .* failed: this part fits nowhere"):
        ranks.start({"refuse": True})
    ranks.start({})
    with pytest.raises(GroupLostError, match=r"rank 1 .* failed: no room for this part"):
        ranks.together({"op": "fail"}, total)
    ranks.start({})
    with pytest.raises(GroupLostError, match="rank 0 failed: MemoryError: no room here"):
        ranks.together({"op": "sum"}, broken)
    ranks.start({})
    with pytest.raises(TandemError, match=r"rank 1 .* said OtherError, and rank 0 that all is well"):
        ranks.together({"op": "raise", "name": "OtherError"}, lambda: None)
