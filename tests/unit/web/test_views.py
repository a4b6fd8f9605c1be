"""The pages over HTTP, on a real Redis: what they show, what they escape, and what is away."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import redis
from drain_parts import Weights, start
from flask.testing import FlaskClient
from page_parts import SCRIPT, plant, plant_hostile

from producer import Producer, keys
from worker.operations import canary_losses
from worker.operations.status import gather
from worker.versions import pause_switch
from worker.web.app import make_app

SECRET = "what the user said in confidence"
HOST = "http://127.0.0.1"
VIEWS = [
    "/learning/",
    "/learning/?x=time&n=300",
    "/learning/versions",
    "/learning/versions?before=4&n=30",
    "/learning/jobs",
]
VIEWS += [f"/learning/versions/{version}" for version in range(1, 10)]


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def client(redis_url: str, tmp_path: Path) -> FlaskClient:
    return make_app(redis_url, run_dir=tmp_path / "none").test_client()


def get(client: FlaskClient, path: str, **more: Any) -> tuple[int, str]:
    answer = client.get(path, base_url=HOST, **more)
    return answer.status_code, answer.get_data(as_text=True)


def test_every_view_shows_what_was_learnt(client: FlaskClient, connection: redis.Redis) -> None:
    plant(connection, 12, rollback=9)
    for path in VIEWS:
        code, text = get(client, path)
        assert code == 200 and "</html>" in text, path
    _, overview = get(client, "/learning/")
    assert '<span class="big">12</span>' in overview and overview.count('<svg class="chart') == 6
    assert "start <code>tandem worker --run-dir " in overview and "unreachable" in overview
    assert 'href="/learning/jobs/chat-12-0"' in overview and "training resumed" in overview
    _, versions = get(client, "/learning/versions")
    assert versions.count("rolled back") == 4 and "back to version 4" in versions and "--state-dir" in versions
    assert "rolled back" in get(client, "/learning/versions/8")[1]
    _, job = get(client, "/learning/jobs/chat-8-0")
    assert "which was rolled back" in job and "with 0 others" in job


PLANTED = {
    "canary_losses": ['{"canary": ' + "9" * 400 + "}", "[" * 100_000, '{"<b>": 1, "good": 2}'],
    "canary_loss": ["x"],
    "hold": [SCRIPT * 10_000],
    "at": ["0001-01-01T00:00:00"],
}


def test_no_state_that_somebody_planted_takes_the_page_away(client: FlaskClient, connection: redis.Redis) -> None:
    plant(connection, 2)
    for field, values in PLANTED.items():
        for value in values:
            connection.hset(keys.STATE, field, value)
            code, text = get(client, "/learning/")
            assert code == 200 and len(text) < 100_000 and '<span class="big">2</span>' in text, (field, value[:20])
    connection.set(keys.WORKER_LOCK, "[" * 100_000)
    assert get(client, "/learning/")[0] == 200
    connection.hset(keys.DROPPED, "chat-1-0", "9" * 5000)
    assert get(client, "/learning/jobs/chat-1-0")[0] == 200
    connection.set(keys.VERSION, "9" * 400)
    code, text = get(client, "/learning/")
    assert code == 200 and "not a version" in text and len(text) < 100_000, "no metric could hold it either"


def test_canary_sets_that_no_worker_can_have_are_not_told_of(connection: redis.Redis, redis_url: str) -> None:
    losses = {"<b>": 1.0, "two words": 1.0} | {f"set-{i}": 1.0 for i in range(1000)}
    connection.hset(keys.STATE, "canary_losses", json.dumps(losses))
    told = gather(redis_url, Path("/nowhere"))["canary"]
    assert list(told) == [f"set-{i}" for i in range(canary_losses.MOST)], "each is a label's value in the metrics"


def test_each_canary_set_is_drawn_and_the_one_that_failed_is_named(
    client: FlaskClient, connection: redis.Redis
) -> None:
    plant(connection, 4)
    for version, facts, tone in ((2, 0.5, 1.5), (3, 0.4, 2.5), (4, 0.3, 1.25)):
        entry = {"version": version, "loss": facts, "losses": json.dumps({"facts": facts, "tone": tone})}
        entry |= {"passed": int(tone < 2), "failed": json.dumps(["tone"] if tone > 2 else [])}
        with connection.pipeline() as pipe:
            pause_switch.announce(pipe, "canary", entry)
            pipe.execute()
    _, text = get(client, "/learning/")
    chart = text.partition('<figure id="chart-canary"')[2].partition("</figure>")[0]
    legend = chart.partition('<ul class="legend"')[2].partition("</ul>")[0]
    assert re.findall(r"</svg> ([^<]+)</li>", legend) == ["facts", "tone", "did not pass"]
    points = re.findall(r'class="point (\w+)"[^>]*><title>([^<]*)</title>', chart)
    assert [name for name, _ in points] == ["s0"] * 3 + ["s1"] * 2 + ["bad"]
    assert points[-1][1].startswith("version 3") and points[-1][1].endswith("tone: did not pass 2.500")
    assert "facts 0.3000, tone 1.250" in chart and "did not pass: tone" in chart
    one = get(client, "/learning/versions/3")[1]
    assert "the canary sets: facts loss" in one and one.count("(beyond its bound)") == 1


def test_a_name_is_allowed_in_any_case(redis_url: str, tmp_path: Path) -> None:
    client = make_app(redis_url, ["Tandem.Example"], run_dir=tmp_path / "none").test_client()
    assert client.get("/learning/", base_url="http://tandem.example").status_code == 200


def test_a_jobs_story_from_queue_to_version_and_what_was_refused(
    client: FlaskClient, connection: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    with Producer(redis_url) as producer:
        for text in ("good", "unpreparable"):
            messages = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": text}]
            producer.enqueue(messages, id=text, meta={"source": SECRET})
    start(connection, Weights(tmp_path), hooks=[], linger=0).work(burst=True)
    found = {path: get(client, f"/learning/{path}")[1] for path in ("jobs", "jobs/good", "jobs/unpreparable", "")}
    assert "finished" in found["jobs/good"] and 'href="/learning/versions/1"' in found["jobs/good"]
    assert 'href="/0/view/job/good"' in found["jobs/good"]
    assert "failed" in found["jobs/unpreparable"] and "no weight was touched" in found["jobs/unpreparable"]
    assert "unpreparable" in found["jobs"]
    for text in found.values():
        title = re.search("<title>(.*)</title>", text)
        assert SECRET not in text and title and "good" not in title.group(1) and "unpreparable" not in title.group(1)


def test_what_redis_holds_is_text_never_html(client: FlaskClient, connection: redis.Redis) -> None:
    plant_hostile(connection)
    for path in VIEWS:
        code, text = get(client, path)
        assert code == 200, path
        assert (
            "<script>alert" not in text
            and "<img" not in text
            and " onerror=alert" not in re.sub("&lt;.*?&gt;", "", text)
        )
        assert " style=" not in text, "a strict policy would refuse it"
    assert "&lt;script&gt;" in get(client, "/learning/versions")[1]
    code, text = get(client, f"/learning/jobs?id={SCRIPT}")
    assert code == 200 and "no id of a transcript" in text and "<script>alert" not in text
    assert get(client, f"/learning/jobs/{SCRIPT}")[0] == 404
    assert get(client, f"/learning/?done={SCRIPT}&_external=1&endpoint=x&n={SCRIPT}&x={SCRIPT}")[0] == 200


@pytest.mark.parametrize(
    "key", [keys.VERSION, keys.STATE, keys.EVENTS, keys.LEDGER, keys.WORKER_LOCK, "rq:queue:feedback"]
)
def test_a_key_of_another_type_is_told_and_the_page_stays(
    client: FlaskClient, connection: redis.Redis, key: str
) -> None:
    plant(connection, 3)
    connection.delete(key)
    connection.zadd(key, {SCRIPT: 1})
    code, text = get(client, "/learning/")
    assert code == 200 and "</html>" in text and "<script>alert" not in text
    for path in ("/learning/versions", "/learning/jobs", "/learning/jobs/chat-1-0"):
        code, text = get(client, path)
        assert code in (200, 503) and "</html>" in text, path


def test_without_redis_and_server_the_page_says_so_and_comes_back_by_itself(tmp_path: Path) -> None:
    client = make_app("redis://:hunter2@127.0.0.1:1/0", run_dir=tmp_path).test_client()
    code, text = get(client, "/learning/")
    assert code == 200 and "cannot reach Redis" in text and "unreachable" in text and 'data-refresh="5"' in text
    for path in ("/learning/versions", "/learning/jobs", "/learning/jobs/a", "/learning/versions/1"):
        code, text = get(client, path)
        assert code in (200, 503) and "cannot reach Redis" in text and "hunter2" not in text
        assert 'data-refresh="5"' in text


def test_a_page_can_be_asked_to_stand_still(client: FlaskClient) -> None:
    still = get(client, "/learning/?refresh=off&n=30")[1]
    assert "data-refresh" not in still and "http-equiv" not in still and 'href="/learning/?n=30"' in still
    assert 'href="/learning/?refresh=off"' in get(client, "/learning/")[1]


def test_a_strict_policy_and_no_other_host(client: FlaskClient, connection: redis.Redis) -> None:
    plant(connection, 2)
    for path in [*VIEWS[:5], "/learning/static/page.js", "/learning/static/page.css", "/learning/nothing"]:
        answer = client.get(path, base_url=HOST)
        policy = answer.headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'self';") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", answer.get_data(as_text=True))
    assert "default-src 'self'" in client.get("/", base_url=HOST).headers["Content-Security-Policy"]


def test_rq_dashboard_leads_to_learning_and_back(client: FlaskClient, connection: redis.Redis, redis_url: str) -> None:
    with Producer(redis_url) as producer:
        producer.enqueue([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], id="a")
    assert 'href="/learning/"' in get(client, "/")[1] and 'href="/"' in get(client, "/learning/")[1]
    assert 'href="/learning/jobs/a"' in get(client, "/0/view/job/a")[1]


def test_strangers_are_refused_on_every_route(client: FlaskClient, connection: redis.Redis) -> None:
    plant(connection, 2)
    for path in [*VIEWS[:5], "/learning/static/page.css", "/learning/actions/pause"]:
        assert client.get(path, base_url="http://evil.example").status_code == 403
        assert get(client, path, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403


def test_an_unknown_version_or_job_is_a_page_that_says_so(client: FlaskClient, connection: redis.Redis) -> None:
    for number in (1, 10**30):
        code, text = get(client, f"/learning/versions/{number}")
        assert code == 404 and "Redis knows nothing of version" in text and "</html>" in text
    code, text = get(client, "/learning/jobs/nobody")
    assert code == 200 and "Neither the queue nor the ledger" in text
    assert get(client, "/learning/")[1].count("No version yet") == 1
