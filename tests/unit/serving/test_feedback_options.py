"""--record and --feedback: off unless asked for; refused in one sentence without a key, or with one that lets ask."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worker.serving.feedback_options import KEY_ENV, KEY_FILE_ENV, FeedbackOptions, check_feedback, read_key
from worker.serving.vllm.feedback.rate import RateLimit
from worker.serving.vllm_flags import LaunchError

KEY = "0123456789abcdef"


def test_both_are_off_by_default() -> None:
    options = FeedbackOptions.of({})
    assert not options.any and not options.record and not options.feedback and options.notes("r") == []


def test_the_environment_hands_them_on_without_the_key() -> None:
    given = FeedbackOptions(record=2.5, record_bytes=5_000_000, feedback=True, key=KEY, per_minute=7, logprobs=True)
    environment = given.environment()
    assert KEY not in "".join(environment.values())
    assert FeedbackOptions.of({**environment, KEY_ENV: KEY}) == given and given.seconds == 9000


def test_the_start_says_what_is_kept() -> None:
    said = " ".join(FeedbackOptions(record=2, feedback=True, key=KEY).notes("redis://h"))
    assert "redis://h for 2 hours" in said and '"store": false' in said and "/v1/feedback" in said and KEY not in said


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_key({KEY_FILE_ENV: str(file), KEY_ENV: "another"}) == KEY
    assert read_key({KEY_ENV: KEY}) == KEY


@pytest.mark.parametrize("key", ["", "short", "with a space in it", "schl\u00fcssel-schl\u00fcssel"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(LaunchError) as refused:
        read_key({KEY_ENV: key})
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "variables"), [(("--api-key", "x", KEY), {}), ((f"--api_key={KEY}",), {}), ((), {"VLLM_API_KEY": KEY})]
)
def test_who_may_ask_may_not_teach(flags: tuple[str, ...], variables: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="whoever may ask"):
        check_feedback(FeedbackOptions(feedback=True, key=KEY), flags, variables)
    check_feedback(FeedbackOptions(feedback=True, key=KEY), ("--api-key", "x"), {})


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        (["--feedback"], {}, "--feedback needs a key of its own"),
        (["--feedback", "--feedback-key-file", "/nowhere/key"], {}, "/nowhere/key"),
        (["--record", "1", "--redis", "http://x"], {}, "not a Redis URL"),
        (["--record", "-1"], {}, "--record"),
        (["--feedback", "--api-key", KEY], {KEY_ENV: KEY}, "whoever may ask"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, flags: list[str], variables: dict[str, str], said: str
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (KEY_ENV, KEY_FILE_ENV)}
    command = [sys.executable, "-m", "worker.cli", "serve", "nothing", "--run-dir", str(tmp_path), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=kept | variables, check=False)
    assert result.returncode in (1, 2) and said in result.stderr and "Traceback" not in result.stderr


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_users_calls_are_limited_and_come_back() -> None:
    clock = Clock()
    rate = RateLimit(2, clock)
    assert [rate.take("a") for _ in range(3)] == [0, 0, 30] and rate.take("b") == 0 and rate.take(None) == 0
    clock.now = 29.0
    assert rate.take("a") == 1
    clock.now = 30.0
    assert [rate.take("a"), rate.take("a")] == [0, 30]
    clock.now = 1e6
    assert [rate.take("a") for _ in range(3)] == [0, 0, 30], "idle time saves up no more than a minute"


def test_the_middleware_looks_at_nothing_else() -> None:
    """GETs, other paths, and a server that is starting go by untouched."""
    from worker.serving.vllm.feedback.recorder import Recorder

    passed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append((receive, send))

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    recorder = Recorder(app, keeper=lambda: None, state=lambda: None)
    for kind, method, path in [
        ("http", "GET", "/v1/models"),
        ("http", "POST", "/tokenize"),
        ("http", "POST", "/v1/completions"),
        ("lifespan", "", ""),
    ]:
        asyncio.run(recorder({"type": kind, "method": method, "path": path}, receive, send))
    assert passed == [(receive, send)] * 4
