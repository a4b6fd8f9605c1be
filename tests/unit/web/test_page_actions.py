"""What may be done from the page: only where allowed, only after a question, only by a form of this very process."""

import re
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Weights, start
from flask.testing import FlaskClient
from page_parts import SCRIPT, plant
from patience import until

from producer import Producer
from worker.consumer.worker_lock import WorkerLock
from worker.versions import pause_switch
from worker.web.app import make_app
from worker.web.rollback_child import Rollbacks, obstacles

HOST = "http://127.0.0.1"
ACTIONS = [f"/learning/actions/{what}" for what in ("pause", "resume", "requeue/unpreparable", "rollback/1")]


@pytest.fixture
def connection(redis_url: str, tmp_path: Path) -> redis.Redis:
    """Three versions, and a job that failed."""
    connection = redis.Redis.from_url(redis_url)
    with Producer(redis_url) as producer:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "unpreparable"}]
        producer.enqueue(messages, id="unpreparable")
    start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
    plant(connection, 3)
    return connection


@pytest.fixture
def allowed(redis_url: str, tmp_path: Path) -> FlaskClient:
    return make_app(redis_url, run_dir=tmp_path / "none", allow_actions=True).test_client()


def get(client: FlaskClient, path: str) -> tuple[int, str]:
    answer = client.get(path, base_url=HOST)
    return answer.status_code, answer.get_data(as_text=True)


def post(client: FlaskClient, path: str, headers: dict[str, str] | None = None, **form: str) -> Any:
    return client.post(path, base_url=HOST, data=form, headers=headers)


def token(text: str) -> str:
    found = re.search('name="token" value="([0-9a-f]{64})"', text)
    assert found, text
    return found.group(1)


def test_without_the_flag_every_action_and_its_question_is_refused_in_a_sentence(
    redis_url: str, connection: redis.Redis, tmp_path: Path
) -> None:
    client = make_app(redis_url, run_dir=tmp_path / "none").test_client()
    for path in [*ACTIONS, "/learning/actions/rollback/progress", "/learning/actions/rollback?version=1"]:
        code, text = get(client, path)
        assert code == 403 and "tandem dashboard --allow-actions" in text and "</html>" in text, path
    for path in ACTIONS:
        assert post(client, path, token="x").status_code == 403
    for path in ("/learning/", "/learning/versions", "/learning/jobs", "/learning/jobs/unpreparable"):
        assert "/learning/actions/" not in get(client, path)[1], "no button that would be refused"
    assert pause_switch.pause_reason(connection) is None


def test_pausing_asks_first_and_resuming_too(allowed: FlaskClient, connection: redis.Redis) -> None:
    assert 'href="/learning/actions/pause"' in get(allowed, "/learning/")[1]
    code, text = get(allowed, "/learning/actions/pause")
    assert code == 200 and pause_switch.pause_reason(connection) is None, "a question changes nothing"
    done = post(allowed, "/learning/actions/pause", token=token(text), reason=f"  {SCRIPT}\n now ")
    assert done.status_code == 303 and pause_switch.pause_reason(connection) == f"{SCRIPT} now"
    text = get(allowed, done.headers["Location"])[1]
    assert "Training is paused." in text and "<script>alert" not in text and 'href="/learning/actions/resume"' in text
    done = post(allowed, "/learning/actions/resume", token=token(get(allowed, "/learning/actions/resume")[1]))
    assert done.status_code == 303 and pause_switch.pause_reason(connection) is None
    assert "Training goes on." in get(allowed, done.headers["Location"])[1]
    done = post(allowed, "/learning/actions/resume", token=token(get(allowed, "/learning/actions/resume")[1]))
    assert "Training was not paused." in get(allowed, done.headers["Location"])[1]


def test_a_failed_job_is_queued_again_once(allowed: FlaskClient, connection: redis.Redis) -> None:
    path = "/learning/actions/requeue/unpreparable"
    assert f'href="{path}"' in get(allowed, "/learning/jobs/unpreparable")[1] + get(allowed, "/learning/jobs")[1]
    form = token(get(allowed, path)[1])
    done = post(allowed, path, token=form)
    assert "queued again" in get(allowed, done.headers["Location"])[1]
    assert connection.lrange("rq:queue:feedback", 0, -1) == [b"unpreparable"]
    assert "Nothing was done" in get(allowed, post(allowed, path, token=form).headers["Location"])[1]
    assert connection.llen("rq:queue:feedback") == 1


@pytest.mark.parametrize("path", ACTIONS)
def test_a_form_that_this_process_did_not_make_does_nothing(
    allowed: FlaskClient, redis_url: str, connection: redis.Redis, tmp_path: Path, path: str
) -> None:
    other = make_app(redis_url, run_dir=tmp_path / "none", allow_actions=True).test_client()
    foreign = token(get(other, "/learning/actions/pause")[1])
    of_another = token(get(allowed, "/learning/actions/requeue/other")[1])
    for form in ({}, {"token": ""}, {"token": "é"}, {"token": foreign}, {"token": of_another}):
        answer = post(allowed, path, **form)
        assert answer.status_code == 403 and "not from this dashboard" in answer.get_data(as_text=True)
    mine = token(get(allowed, "/learning/actions/pause")[1])
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert post(allowed, "/learning/actions/pause", headers, token=mine).status_code == 403
    assert pause_switch.pause_reason(connection) is None and not connection.llen("rq:queue:feedback")


def test_a_rollback_that_cannot_be_started_here_shows_the_command_to_copy(
    allowed: FlaskClient, connection: redis.Redis, tmp_path: Path
) -> None:
    with WorkerLock(connection, "the-worker"):
        code, text = get(allowed, "/learning/actions/rollback/1")
    assert code == 200 and "the-worker" in text and "stop it first" in text and "cannot be reached" in text
    assert f"tandem rollback 1 --reason &#39;from the dashboard&#39; --run-dir {tmp_path}/none" in text
    assert 'method="post"' not in text, "no button that cannot work"
    path = "/learning/actions/rollback/1"
    answer = post(allowed, path, token=allowed.application.extensions["tandem"].tokens.of(path))
    assert answer.status_code == 303 and answer.headers["Location"] == path
    assert "None was started" in get(allowed, "/learning/actions/rollback/progress")[1]


@pytest.mark.parametrize(("asked", "code"), [("3", 400), ("4", 400), ("2", 200)])
def test_only_an_older_version_can_be_gone_back_to(
    allowed: FlaskClient, connection: redis.Redis, asked: str, code: int
) -> None:
    answer = allowed.get(f"/learning/actions/rollback?version={asked}", base_url=HOST)
    assert answer.status_code == 302 and get(allowed, answer.headers["Location"])[0] == code
    for nonsense in ("", "-1", "x"):
        assert get(allowed, f"/learning/actions/rollback?version={nonsense}")[0] == 400


def test_the_command_runs_as_a_child_that_is_watched_and_keeps_the_password_off_its_line(
    redis_url: str, tmp_path: Path
) -> None:
    rollbacks = Rollbacks(redis_url, tmp_path / "run dir", tmp_path / "state", ["--max-tokens", "512"])
    password = redis_url.split("@")[0].split(":")[-1]
    assert rollbacks.progress() is None and rollbacks.start(2, requeue=True)
    command = f"tandem rollback 2 --reason 'from the dashboard' --run-dir '{tmp_path}/run dir'"
    command += f" --state-dir {tmp_path}/state --max-tokens 512 --requeue"
    assert rollbacks.command(2, True) == command and password not in command
    if (first := rollbacks.progress()) is not None and first.code is None:
        assert not rollbacks.start(3, requeue=False), "one at a time"
    until(lambda: rollbacks.progress().code is not None, "it ends")  # type: ignore[union-attr]
    ended = rollbacks.progress()
    assert ended is not None and ended.code == 1 and "no server listens" in ended.said and password not in ended.said
    assert ended.seconds == rollbacks.progress().seconds  # type: ignore[union-attr]
    rollbacks.wait()


def test_what_is_in_the_way_of_a_rollback() -> None:
    fine = {"redis": {"reachable": True}, "worker": {"state": "none"}, "server": {"state": "torn"}}
    assert obstacles(fine) == [], "a dead worker's lock and torn weights are what a rollback mends"
    assert len(obstacles(fine | {"worker": {"state": "idle", "name": "w", "pid": 1, "host": "h"}})) == 1
    assert len(obstacles(fine | {"server": {"state": "unreachable"}})) == 1
    assert len(obstacles({"redis": {"reachable": False}, "server": {"state": "serving"}})) == 1
