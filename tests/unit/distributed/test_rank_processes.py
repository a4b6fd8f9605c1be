"""Processes of ranks: they compute together; what one of them alone fails at ends all, and is said by name."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from patience import PATIENCE
from rank_child import OtherError, total

from producer.errors import TandemError
from worker.distributed.errors import GroupLostError
from worker.distributed.rank_processes import RankProcesses

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


def test_who_is_waited_for_in_vain_is_named_and_ended(ranks: RankProcesses) -> None:
    ranks.start({})
    hangs = ranks.others[0].process
    named = rf"^rank 1 \(process {hangs.pid}\) did not answer within 600 s, and was ended"
    with pytest.raises(GroupLostError, match=named):
        ranks.together({"op": "hang"}, waited_in_vain)
    assert hangs.poll() is not None


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
