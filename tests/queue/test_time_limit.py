"""The limit on preparing one transcript: it ends what swallows every exception, and nothing after it."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Lines, Weights, start
from patience import PATIENCE

from producer.client import Producer
from worker.consumer import time_limit as module
from worker.consumer.time_limit import TimeLimitExceeded, time_limit


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.05)


def computes(swallows: type[BaseException], times: int) -> list[str]:
    """Ends by itself only after `times` swallowed exceptions, or far too late."""
    caught: list[str] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and len(caught) < times:
        try:
            while time.monotonic() < deadline:
                pass
        except swallows as error:
            caught.append(type(error).__name__)
    return caught


def test_it_is_no_exception_that_a_template_would_swallow() -> None:
    with pytest.raises(TimeLimitExceeded), time_limit(0.05):
        computes(Exception, times=1)
    assert not issubclass(TimeLimitExceeded, Exception)


def test_it_comes_again_when_it_was_swallowed_all_the_same() -> None:
    caught: list[str] = []
    with pytest.raises(TimeLimitExceeded), time_limit(0.05):
        caught += computes(BaseException, times=2)
        time.sleep(60)
    assert caught == ["TimeLimitExceeded"] * 2


def test_time_in_which_it_does_not_compute_counts_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transcript must not fail because others have the CPU, or because its process was stopped for a while."""
    monkeypatch.setattr(module, "PATIENCE", 1e9)
    with time_limit(0.2):
        time.sleep(0.6)


def test_what_hangs_without_computing_is_ended_too() -> None:
    with pytest.raises(TimeLimitExceeded), time_limit(0.01):
        time.sleep(PATIENCE)


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    """Its alarms are one."""
    code = """
import sys
from worker.consumer import time_limit as module
module.AGAIN = 0.05
with module.time_limit(0.5):
    print("inside", flush=True)
    sys.stdin.read(1)
print("whole")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == b"inside\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(6)  # more than ten times the limit, on the clock
        child.stdin.write(b"x")
        child.stdin.flush()
        child.send_signal(signal.SIGCONT)
        assert child.stdout.read() == b"whole\n" and child.wait(PATIENCE) == 0


@pytest.fixture
def no_alarm() -> Iterator[None]:
    """Without the alarm that ends a test that hangs."""
    set_before = signal.setitimer(signal.ITIMER_REAL, 0)
    yield
    signal.setitimer(signal.ITIMER_REAL, *set_before)


def test_nothing_is_left_of_it_afterwards(no_alarm: None) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    with pytest.raises(ZeroDivisionError), time_limit(60):
        _ = 1 / 0
    with pytest.raises(TimeLimitExceeded), time_limit(0.01):
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == before


def test_an_alarm_that_was_set_before_goes_on(no_alarm: None) -> None:
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    with pytest.raises(TimeLimitExceeded), time_limit(0.01):
        time.sleep(60)
    left, again = signal.setitimer(signal.ITIMER_REAL, 0)
    assert 0 < left < 1000 and again == 7


def test_a_thread_has_no_limit_and_disturbs_nobody(no_alarm: None) -> None:
    done: list[str] = []

    def work() -> None:
        with time_limit(0.01):
            done.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["done"] and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_transcript_whose_preparation_swallows_exceptions_fails_alone(redis_url: str, tmp_path: Path) -> None:
    weights, lines, producer = Weights(tmp_path), Lines(), Producer(redis_url)
    for job_id in ("before", "hangs", "after"):
        producer.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}], id=job_id)

    def prepare(job_id: str, transcript: Any) -> Any:
        if job_id == "hangs":
            computes(Exception, times=1)
        return Weights.prepare(weights, job_id, transcript)

    weights.prepare = prepare  # type: ignore[method-assign]
    start(redis.Redis.from_url(redis_url), weights, hooks=[lines], linger=0.0, prepare_limit=1).work(burst=True)
    assert weights.trained == ["before", "after"]
    assert lines.rejected == {"hangs": "preparing the transcript took more than 1 s"}
