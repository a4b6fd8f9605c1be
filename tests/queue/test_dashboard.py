"""The dashboard as a user runs it: a process of its own, asked over HTTP for every page it has."""

import contextlib
import importlib
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from drain_parts import Weights, start
from patience import PATIENCE
from rq import Queue, Worker
from rq.job import Job

from producer import keys
from producer.client import Producer
from worker.consumer.jobs import open_queue

SECRET = "what the user said in confidence"
SCRIPT = "<script>alert(1)</script>"


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": SECRET}, {"role": "assistant", "content": text}]


@pytest.fixture
def connection(redis_url: str, tmp_path: Path) -> redis.Redis:
    """A Redis with a job in every state, made by the real producer and worker."""
    connection, producer = redis.Redis.from_url(redis_url), Producer(redis_url)
    for text in ("good", "unpreparable"):
        producer.enqueue(say(text), id=text, meta={"source": SCRIPT})
    hostile = {"data": zlib.compress(msgpack.packb([SCRIPT, None, [], {}])), "description": SCRIPT}
    connection.hset("rq:job:hostile", mapping=hostile | {"meta": msgpack.packb({"x": b"\xff", "y": SCRIPT})})
    connection.rpush(f"rq:queue:{keys.QUEUE}", "hostile")
    start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
    queue = open_queue(connection)
    parent = queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="queued", description=SECRET)
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="deferred", depends_on=parent)
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="canceled").cancel()
    # A worker that is inside a step right now.
    from worker.consumer import transitions

    worker = Worker([queue], connection=connection, name="busy-one")
    worker.register_birth()
    queue.enqueue(keys.FUNCTION, {"messages": say("good")}, job_id="started", at_front=True)
    held, _ = transitions.take(queue, 1, 0)
    transitions.begin(worker, queue, held)
    return connection


@pytest.fixture
def site(connection: redis.Redis, redis_url: str) -> Iterator[str]:
    """One whose buttons work."""
    with dashboard(redis_url, "--allow-actions") as running:
        yield running


@contextlib.contextmanager
def dashboard(redis_url: str, *options: str) -> Iterator[str]:
    """Where it answers."""
    url = f"{redis_url}&decode_responses=True"  # what another program wants of the same Redis
    command = [sys.executable, "-m", "worker.cli", "dashboard", "--redis", url, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", first)
    assert found, first + process.stdout.read()
    password = redis_url.split("@")[0].split(":")[-1]
    try:
        assert password not in first
        yield found.group()
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def get_json(url: str) -> Any:
    status, text = ask(url)
    assert status == 200, (url, text[:500])
    return json.loads(text)


STATES = {
    "queued": ["queued"],
    "started": ["started"],
    "finished": ["good"],
    "failed": ["hostile", "unpreparable"],
    "deferred": ["deferred"],
    "canceled": ["canceled"],
    "scheduled": [],
}


def test_every_page_answers_and_none_shows_a_transcript(site: str, connection: redis.Redis, redis_url: str) -> None:
    pages = ["/", "/0/", "/0/view", "/0/view/queues", "/0/view/workers", "/0/view/jobs", "/favicon.ico"]
    pages += [f"/0/view/jobs/feedback/{state}/8/{order}/1" for state in STATES for order in ("asc", "dsc")]
    pages += [f"/0/view/job/{job}" for jobs in STATES.values() for job in jobs]
    data = ["/0/data/queues.json", "/0/data/workers.json"]
    data += [f"/0/data/jobs/feedback/{state}/8/{order}/1.json" for state in STATES for order in ("asc", "dsc")]
    data += [f"/0/data/job/{job}.json" for jobs in STATES.values() for job in jobs]
    password = redis_url.split("@")[0].split(":")[-1]
    for page in pages + data:
        request = urllib.request.Request(site + page)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            body = answer.read().decode(errors="replace")
            assert answer.status == 200 and SECRET not in body and password not in body, page
    for state, jobs in STATES.items():
        listed = get_json(f"{site}/0/data/jobs/feedback/{state}/8/asc/1.json")["jobs"]
        assert sorted(job["id"] for job in listed) == jobs
        assert all(job["description"] == f"transcript {job['id']}" for job in listed)
    (worker,) = [w for w in get_json(f"{site}/0/data/workers.json")["workers"] if w["name"] == "busy-one"]
    assert (
        worker["current_job"]["job_id"] == "started" and worker["current_job"]["call_string"] == "worker.train(started)"
    )
    (queue,) = get_json(f"{site}/0/data/queues.json")["queues"]
    assert (queue["count"], queue["failed_job_registry_count"], queue["finished_job_registry_count"]) == (1, 2, 1)


def test_a_jobs_page_has_its_result_and_shows_foreign_html_as_text(site: str, connection: redis.Redis) -> None:
    good = get_json(f"{site}/0/data/job/good.json")
    assert good["status"] == "finished" and good["result"] == {"version": 1}
    assert json.loads(good["metadata"].replace("&lt;", "<").replace("&gt;", ">")) == {"source": SCRIPT}
    hostile = get_json(f"{site}/0/data/job/hostile.json")
    assert "is not allowed" in hostile["exc_info"] and "script&gt;" in hostile["exc_info"]
    assert "<" not in json.dumps([good, hostile])


def test_rqs_own_classes_stay_as_they_are_in_a_process_that_shows_the_dashboard() -> None:
    importlib.import_module("worker.web.dashboard_config")
    assert (Queue.job_class, Worker.job_class, Worker.queue_class) == (Job, Job, Queue)


def test_requeue_and_delete_work(site: str, connection: redis.Redis, tmp_path: Path) -> None:
    queue = open_queue(connection)
    assert ask(f"{site}/job/unpreparable/requeue", "POST")[0] == 200
    assert queue.job_ids == ["queued", "unpreparable"] and queue.failed_job_registry.get_job_ids() == ["hostile"]
    assert json.loads(ask(f"{site}/requeue/feedback", "POST")[1])["count"] == 1
    assert queue.job_ids == ["queued", "unpreparable", "hostile"]
    assert ask(f"{site}/queue/feedback/compact", "POST")[0] == 200
    weights = Weights(tmp_path)
    start(connection, weights, hooks=[], linger=0).work(burst=True)  # and the worker can read what was requeued
    assert "queued" in weights.trained
    failed = sorted(queue.failed_job_registry.get_job_ids())
    assert failed == ["hostile", "started", "unpreparable"]  # "started" had no retries, and its worker never beat
    assert ask(f"{site}/job/hostile/delete", "POST")[0] == 200
    assert "hostile" not in queue.failed_job_registry.get_job_ids() and not connection.exists("rq:job:hostile")
    assert ask(f"{site}/queue/feedback/compact", "POST") == (409, "Redis refused: no such key")  # it is empty
    assert ask(f"{site}/queue/feedback/failed/empty", "POST")[0] == 200
    assert queue.failed_job_registry.get_job_ids() == []


CHANGING = ["/job/unpreparable/requeue", "/job/unpreparable/delete", "/requeue/feedback", "/queue/feedback/compact"]
CHANGING += [f"/queue/feedback/{state}/empty" for state in STATES]


def test_nothing_can_be_changed_unless_it_was_allowed(connection: redis.Redis, redis_url: str) -> None:
    connection.rpush(f"rq:queue:{keys.QUEUE}", "lost", SCRIPT)
    connection.hset(f"rq:job:{SCRIPT}", "status", "queued")
    before = {key: connection.dump(key) for key in connection.keys("rq:*")}
    with dashboard(redis_url) as site:
        for path in CHANGING:
            status, text = ask(site + path, "POST")
            assert status == 403 and "tandem dashboard --allow-actions" in text, path
        assert ask(f"{site}/requeue/feedback")[0] == 403, "a link, or an image"
        ids = [job["id"] for job in get_json(f"{site}/0/data/jobs/feedback/queued/8/asc/1.json")["jobs"]]
        assert ids == ["queued"], "the others are not shown, and stay"
        for page in ("/0/view/jobs/feedback/failed/8/asc/1", "/0/view/job/unpreparable"):
            _, text = ask(site + page)
            assert "read-only" in text and "delete-job-btn" not in text.split("<script type=")[0]
    assert {key: connection.dump(key) for key in connection.keys("rq:*")} == before


def test_it_says_what_whoever_reaches_it_can_do(redis_url: str) -> None:
    command = [sys.executable, "-m", "worker.cli", "dashboard", "--redis", redis_url, "--port", "0"]
    command += ["--host", "0.0.0.0", "--allow-actions"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert "can pause, roll back, and requeue and delete jobs" in process.stderr.readline()
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}],
)
def test_another_sites_page_cannot_press_the_buttons(
    site: str, connection: redis.Redis, headers: dict[str, str]
) -> None:
    assert ask(f"{site}/job/unpreparable/requeue", "POST", **headers)[0] == 403
    assert ask(f"{site}/requeue/feedback", "GET", **headers)[0] == 403
    assert len(open_queue(connection).failed_job_registry.get_job_ids()) == 2


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_image_of_another_page_can_requeue(site: str, connection: redis.Redis, method: str) -> None:
    """Neither browser header need be there: a plain address that is not localhost gets none."""
    for headers in ({}, {"Sec_Fetch_Site": "same-site"}):
        assert ask(f"{site}/requeue/feedback", method, **headers)[0] == 403
    assert len(open_queue(connection).failed_job_registry.get_job_ids()) == 2


def test_names_in_redis_are_no_html(site: str, connection: redis.Redis) -> None:
    name = '"' + SCRIPT
    connection.sadd("rq:queues", f"rq:queue:{name}")
    connection.sadd("rq:workers", f"rq:worker:{name}")
    connection.hset(f"rq:worker:{name}", mapping={"queues": name, "state": name, "birth": "2026-01-01T00:00:00Z"})
    for data in ("queues", "workers"):
        _, text = ask(f"{site}/0/data/{data}.json")
        assert "<script" not in text and "&quot;&lt;script" in text, data


def test_a_port_in_use_is_said_so(site: str, redis_url: str) -> None:
    port = site.rpartition(":")[2]
    command = [sys.executable, "-m", "worker.cli", "dashboard", "--redis", redis_url, "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 1 and "choose another --port" in ended.stderr


def test_a_url_that_cannot_be_read_is_refused_without_its_password() -> None:
    command = [sys.executable, "-m", "worker.cli", "dashboard", "--redis", "redis://:hunter2/x@h", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 1 and "not a Redis URL" in ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout


def test_the_queue_is_listed_before_any_worker_ran(redis_url: str) -> None:
    Producer(redis_url).enqueue(say("good"), id="a")
    with dashboard(redis_url) as site:
        (queue,) = get_json(f"{site}/0/data/queues.json")["queues"]
    assert (queue["name"], queue["count"]) == (keys.QUEUE, 1)


@pytest.mark.parametrize("path", ["/job/unpreparable/requeue", "/requeue/feedback"])
def test_what_is_requeued_stays_on_this_queue_whatever_its_hash_says(
    site: str, connection: redis.Redis, path: str
) -> None:
    connection.hset("rq:job:unpreparable", "origin", "default")
    assert ask(site + path, "POST")[0] == 200
    assert "unpreparable" in open_queue(connection).job_ids and not connection.exists("rq:queue:default")
