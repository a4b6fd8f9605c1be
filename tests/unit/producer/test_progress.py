"""How far long work is, on a terminal and in a log: on stderr alone, and nothing of what is short."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE, until

from producer import progress as module
from producer.progress import BYTES, describe, progress

WORK = """
import sys, time
from producer import progress as module
module.QUIET = module.REDRAW = 0.01
if sys.argv[1] == "plain":
    sys.modules["rich.live"] = None
with module.progress("enqueue", 40, "records") as shown:
    shown.advance(10)
    for _ in range(20):
        time.sleep(0.02)
    shown.say("error: line 3")
    time.sleep(0.1)
print("the result")
"""


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it: the suite is silent."""
    monkeypatch.delenv(module.OFF)


def on_terminal(how: str) -> tuple[str, str]:
    """(stdout, what the terminal saw) of `WORK`."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "TANDEM_PROGRESS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, how], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so where the other side has ended
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    return out, seen.decode()


@pytest.mark.parametrize("how", ["rich", "plain"])
def test_a_terminal_gets_a_bar_and_stdout_the_result_alone(how: str) -> None:
    out, seen = on_terminal(how)
    assert out == "the result\n"
    assert "enqueue: 25 %, 10 of 40 records, about " in seen
    assert ("━" if how == "rich" else "[######------------------]") in seen
    assert re.search(r"(?m)(^|\r|K)error: line 3\r?$", seen), seen  # on a line of its own
    assert "Traceback" not in seen


def test_without_a_terminal_a_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET", 0.0)
    monkeypatch.setattr(module, "EVERY", 0.01)
    seen: list[str] = []

    def lines() -> list[str]:
        seen.extend(capsys.readouterr().err.splitlines())
        return seen

    with progress("checkpoint", 100e6, BYTES) as shown:
        until(lambda: any("checkpoint: 0 %, 0.0 of 100.0 MB" in line for line in lines()), "the first line")
        shown.advance(25e6, "model.safetensors")
        until(
            lambda: any("25 %, 25.0 of 100.0 MB, model.safetensors, about " in line for line in lines()), "a later one"
        )
    assert capsys.readouterr().out == ""


def test_a_program_with_a_log_gets_lines_in_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET", 0.0)
    with caplog.at_level(logging.INFO, "tandem.progress"), progress("rebuild", 4, "batches"):
        until(lambda: caplog.messages, "a line in the log")
    assert caplog.messages[0].startswith("rebuild: 0 %, 0 of 4 batches, ") and capsys.readouterr().err == ""


def test_what_is_short_shows_nothing_and_its_errors_come_through(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET", PATIENCE)  # ends at once all the same
    with pytest.raises(ZeroDivisionError), progress("short", 2) as shown:
        shown.say("a line")
        shown.at(1, 2)
        raise ZeroDivisionError
    assert capsys.readouterr() == ("", "a line\n")


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "QUIET", 0.0)
    monkeypatch.setenv(module.OFF, "off")
    with progress("work") as shown:
        shown._thread.join(30)  # it ends by itself: there is nothing to show
        assert not shown._thread.is_alive()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("eval", 12, 40, "conversations", "", 6.0), "eval: 30 %, 12 of 40 conversations, about 14 s left"),
        (("enqueue", 3e6, None, BYTES, "", 7.0), "enqueue: 3.0 MB, 7 s so far"),
        (("look", 0, None, "", "", 3.0), "look: 3 s so far"),
        (("warm-up", 2, 4, "", "512 tokens", 600.0), "warm-up: 50 %, 2 of 4, 512 tokens, about 10 min left"),
        (("enqueue", 5, 4, "records", "", 8000.0), "enqueue: 100 %, 4 of 4 records, 2.2 h so far"),
        (("empty", 0, 0, "records", "", 1.0), "empty: 1 s so far"),
    ],
)
def test_words(arguments: tuple[str, float, float | None, str, str, float], text: str) -> None:
    assert describe(*arguments) == text


amount = st.floats(0, 1e15)


@given(amount, st.none() | amount, st.sampled_from([BYTES, "", "batches"]), amount)
def test_any_amounts_make_one_line(done: float, total: float | None, unit: str, seconds: float) -> None:
    found = describe("work", done, total, unit, "", seconds)
    assert "\n" not in found and found.startswith("work: ")
    percent = re.search(r"(\d+) %", found)
    assert bool(percent) == bool(total) and (percent is None or int(percent[1]) <= 100)
