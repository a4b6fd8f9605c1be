"""`tandem worker --replicas N` as a parent: it ends whatever its children do, and cuts none of them short."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE, until

PROGRAM = str(Path(__file__).parents[2] / "helpers" / "side_child.py")
PLACES = ["--run-dir", "/run/of {replica}", "--state-dir=/var/state-{replica}"]


class Parent:
    """It, with two children in `folder`. seconds: see `STOP_SECONDS`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        code = (
            "import logging, sys; from worker.cli.side_by_side import run_side_by_side;"
            " logging.basicConfig(level=logging.INFO);"
            f" sys.exit(run_side_by_side([{str(folder)!r}, *{PLACES!r}], 2, [sys.executable, {PROGRAM!r}], {seconds}))"
        )
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=self.log)
        self.says("started: replica 0 (process")  # it hears signals
        self.children = [int(self.text(f"ready-{number}")) for number in range(2)]

    def text(self, name: str) -> str:
        path = self.folder / name
        until(path.exists, f"{name} is there")
        return path.read_text()

    def may_end(self, *numbers: int) -> None:
        for number in numbers:
            (self.folder / f"may-end-{number}").touch()

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def says(self, sentence: str) -> None:
        until(lambda: sentence in self.said() or self.process.poll() is not None, sentence)
        assert sentence in self.said()

    def ended(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Parent]]:
    made: list[Parent] = []

    class Started(Parent):
        def __init__(self, seconds: float = PATIENCE) -> None:
            super().__init__(tmp_path, seconds)
            made.append(self)

    yield Started
    for parent in made:
        for pid in parent.children if parent.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # those that may not end would outlive it
        parent.process.kill()
        parent.process.wait()
        parent.log.close()


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_is_stopped_is_named_and_woken_to_hear_the_end(start: type[Parent], number: int) -> None:
    parent = start()
    parent.may_end(0, 1)
    os.kill(parent.children[number], signal.SIGSTOP)
    parent.says(f"replica {number} (process {parent.children[number]}) is stopped")
    parent.process.terminate()
    assert parent.ended() == 0, parent.said()
    assert [parent.text(f"told-{n}") for n in range(2)] == ["told\n"] * 2


def test_a_second_signal_cuts_nobody_short_and_says_so(start: type[Parent]) -> None:
    parent = start()
    parent.process.send_signal(signal.SIGINT)
    parent.text("told-0")
    parent.process.send_signal(signal.SIGINT)
    parent.says("told to stop again, which changes nothing")
    parent.may_end(0)
    parent.text("told-1")
    parent.process.terminate()
    until(lambda: parent.said().count("which changes nothing") == 2, "it is said again")
    parent.may_end(1)
    assert parent.ended() == 0, parent.said()
    assert [parent.text(f"told-{n}") for n in range(2)] == ["told\n"] * 2, "each once"


def test_one_that_does_not_end_is_killed_and_named(start: type[Parent]) -> None:
    parent = start(0.5)
    parent.may_end(0)
    parent.process.terminate()
    assert parent.ended() == 0
    named = f"replica 1 (process {parent.children[1]}) did not end within 0.5 s, and is killed"
    assert parent.said().count(named) == 1


def test_the_command_that_starts_one_again_has_its_places(start: type[Parent]) -> None:
    parent = start()
    os.kill(parent.children[1], signal.SIGKILL)
    again = "tandem worker --replica 1/2 --run-dir '/run/of 1' --state-dir /var/state-1"
    parent.says(f"replica 1 ended with -9: the others go on; `{again}`, with all other flags as here, starts it again")
    parent.may_end(0)
    parent.process.terminate()
    assert parent.ended() == 0
