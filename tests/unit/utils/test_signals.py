"""A signal must not cut an update in two."""

import signal
import subprocess
import sys
import threading

import pytest

from worker.utils.signals import deferred


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("the rest of the block")
        steps.append("never here")
    assert steps == ["the rest of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_terminate_without_a_handler_still_ends_the_process_afterwards() -> None:
    program = (
        "import signal\nfrom worker.utils.signals import deferred\n"
        "with deferred():\n    signal.raise_signal(signal.SIGTERM)\n    print('whole', flush=True)\nprint('never')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "whole\n" and run.returncode == -signal.SIGTERM


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with deferred():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
