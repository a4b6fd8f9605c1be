"""Collectives that do not end are ended; those that take long one after the other are not."""

import os
import threading
import time

import pytest
from patience import until

from worker.distributed.device_watch import TORCH_WATCHES, DeviceWatch, watch_alone


class Collective:
    def __init__(self) -> None:
        self.ended = threading.Event()


def test_what_ends_is_left_alone() -> None:
    aborted: list[bool] = []
    watch = DeviceWatch(600.0, lambda: aborted.append(True), pace=0.001)
    every = [Collective() for _ in range(3)]
    for one in every:
        watch.began(one.ended.is_set)
    for one in every:
        one.ended.set()
    until(lambda: not watch._under_way, "have seen all of them end")
    watch.close()
    assert not watch.failed and not aborted


def test_what_does_not_end_is_given_up_and_said_before_anything_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    said: list[bool] = []
    watch = DeviceWatch(0.05, lambda: said.append(watch.failed), pace=0.001)
    watch.began(Collective().ended.is_set)
    until(lambda: said, "give it up")
    assert said == [True] and "took more than 0.05 s" in caplog.text


def test_each_has_its_time_from_the_end_of_the_one_before() -> None:
    """Both were asked for at once, and the first took almost all of its time."""
    aborted = threading.Event()
    watch = DeviceWatch(1e6, aborted.set, pace=0.001)
    first, second = Collective(), Collective()
    watch.began(first.ended.is_set)
    watch.began(second.ended.is_set)
    watch._under_way[1] = (time.monotonic() - 2e6, second.ended.is_set)
    first.ended.set()
    until(lambda: len(watch._under_way) == 1, "see the first one end")
    assert not aborted.wait(0.2) and not watch.failed
    second.ended.set()
    until(lambda: not watch._under_way, "see the second one end")
    watch.close()


def test_what_is_given_up_is_ended_once_and_nothing_after_the_close() -> None:
    said: list[bool] = []
    watch = DeviceWatch(600.0, lambda: said.append(watch.failed), pace=0.001)
    assert watch.waiting == 0
    one = Collective()
    watch.began(one.ended.is_set)
    until(lambda: watch.waiting > 0.05, "seconds pass")
    watch.give_up()
    watch.give_up()
    assert said == [True], "it was said before, and ended once"
    one.ended.set()
    until(lambda: watch.waiting == 0, "it has ended")
    watch.close()
    closed = DeviceWatch(600.0, lambda: said.append(True))
    closed.close()
    closed.give_up()
    assert said == [True] and not closed.failed


def test_torch_neither_ends_the_process_nor_sleeps_for_a_collective_that_was_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in TORCH_WATCHES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    watch_alone()
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1", "what the environment says stays"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0", "the monitor sleeps 8 minutes after it has dumped"
    assert 4 * int(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) < 1000, "milliseconds"
