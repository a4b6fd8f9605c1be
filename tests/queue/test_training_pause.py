"""Training is paused: by a hook or a person, it loses no job, and it goes on when somebody resumes it."""

from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from drain_parts import Lines, Weights, events, start

from producer import Producer, keys
from worker.cli.pause import command as pause_command
from worker.cli.resume import command as resume_command
from worker.config.protocol import UnavailableError
from worker.versions import pause_switch


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_training_on_hold_loses_no_job_and_goes_on_when_resumed(redis_url: str, tmp_path: Path) -> None:
    connection, producer = redis.Redis.from_url(redis_url), Producer(redis_url)
    weights, lines = Weights(tmp_path), Lines()
    good = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "good"}]
    ids = [producer.enqueue(good, id=f"t{i}").id for i in range(6)]

    class HoldsOnce(Lines):
        def on_version(self, line: dict[str, Any]) -> None:
            if line["version"] == 2:
                pause_switch.pause(connection, "the canary died")

    def check(burst: bool = True, said: Any = lines.say) -> None:
        pause_switch.wait(connection, burst=burst, stopping=lambda: False, tell=said, poll=0.01)

    with pytest.raises(UnavailableError, match="the canary died; `tandem resume`"):
        start(connection, weights, hooks=[HoldsOnce()], max_jobs=1, check=check).work(burst=True)
    assert len(weights.trained) == 2 and connection.llen(f"rq:queue:{keys.QUEUE}") == 4
    assert {producer.status(i).state for i in ids} == {"finished", "queued"}

    told: list[str] = []

    def resumed_by_a_person(sentence: str) -> None:
        told.append(sentence)
        if "paused" in sentence:
            answer = CliRunner().invoke(resume_command, ["--redis", redis_url])
            assert answer.exit_code == 0 and "it was paused: the canary died" in answer.output

    worker = start(connection, weights, hooks=[], max_jobs=1, check=lambda: check(False, resumed_by_a_person))
    worker.work(burst=True)
    assert sorted(weights.trained) == ids and told[-1] == "training goes on" and len(told) == 2
    assert {"held", "resumed"} <= set(events(connection))
    assert "not paused" in CliRunner().invoke(resume_command, ["--redis", redis_url]).output


def test_a_person_pauses_training_and_says_why(redis_url: str) -> None:
    connection = redis.Redis.from_url(redis_url)
    answer = CliRunner().invoke(pause_command, ["--redis", redis_url, "--reason", "an evaluation runs"])
    assert answer.exit_code == 0 and "tandem resume" in answer.output
    assert pause_switch.pause_reason(connection) == "an evaluation runs"
    assert "an evaluation runs" in CliRunner().invoke(resume_command, ["--redis", redis_url]).output
    assert pause_switch.pause_reason(connection) is None


def test_a_worker_on_hold_can_be_stopped(connection: redis.Redis) -> None:
    pause_switch.pause(connection, "by hand")
    answers = iter([False, False, True])
    pause_switch.wait(connection, burst=False, stopping=lambda: next(answers), tell=lambda said: None, poll=0.001)
    assert pause_switch.pause_reason(connection) == "by hand" and next(answers, None) is None
