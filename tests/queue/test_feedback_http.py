"""POST and GET /v1/feedback against a real Redis. The same behind a real vLLM: tests/server and tests/end_to_end."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from feedback_app import ANSWER, QUESTION, Running, running
from patience import until
from rq.job import Job

from producer import Producer, keys
from producer.completions import new_key
from producer.serializer import MsgpackSerializer
from worker.testing.redis_server import RedisServer

Scene = Callable[[Running], Awaitable[Any]]


@pytest.fixture
def play(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a scene on the application."""

    def run(scene: Scene, url: str = redis_url, **options: Any) -> Any:
        async def whole() -> Any:
            async with running(url, monkeypatch, **options) as app:
                return await scene(app)

        return asyncio.run(whole())

    return run


def queued(url: str) -> dict[str, dict[str, Any]]:
    """Id -> transcript, of all that waits in the queue."""
    with redis.Redis.from_url(url) as client:
        ids = [one.decode() for one in client.lrange("rq:queue:feedback", 0, -1)]
        jobs = [Job.fetch(one, connection=client, serializer=MsgpackSerializer) for one in ids]
        return {job.id: job.args[0] for job in jobs}


def refusals(client: redis.Redis) -> int:
    """How often Redis said that it is full."""
    return int(client.info("errorstats").get("errorstat_OOM", {}).get("count", 0))


def error(answer: httpx.Response) -> tuple[int, str | None]:
    """(status, the field that is named) of an answer in OpenAI's shape of errors."""
    said = answer.json()["error"]
    assert said["code"] == answer.status_code and said["message"]
    return answer.status_code, said["param"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_thumb_and_a_key_is_all_it_takes(play: Any, redis_url: str, stream: bool) -> None:
    async def scene(app: Running) -> httpx.Response:
        asked = {"model": "m", "messages": QUESTION, "stream": stream, "user": "u-1"}
        chat = await app.client.post("/v1/chat/completions", json=asked)
        sent = await app.say({"id": chat.headers["x-tandem-completion"], "rating": -1})
        assert sent.status_code == 202
        where = await app.client.get(f"/v1/feedback/{sent.json()['id']}")
        assert where.status_code == 200 and where.json() == sent.json()
        return sent

    sent = play(scene)
    assert sent.json()["state"] == "queued" and sent.json()["version"] is None
    ((job_id, transcript),) = queued(redis_url).items()
    assert job_id == sent.json()["id"] and transcript["rating"] == -1
    assert transcript["messages"] == [*QUESTION, {"role": "assistant", "content": ANSWER}]


def test_a_rating_replaces_the_last_and_a_correction_is_its_own(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> list[Any]:
        key = await app.key()
        bodies = [
            {"rating": True, "user": "a"},
            {"rating": False, "user": "a"},
            {"rating": -1, "correction": "At six.", "user": "a"},
            {"rating": 0, "user": "a"},
        ]
        return [(await app.say({"id": key} | body)).json() for body in bodies]

    liked, disliked, corrected, withdrawn = play(scene)
    assert liked["id"] == disliked["id"] != corrected["id"] and withdrawn["state"] == "withdrawn"
    assert [one["id"] for one in corrected["also"]] == [liked["id"]] and "also" not in liked
    (transcript,) = queued(redis_url).values()
    assert transcript["rejected"]["content"] == ANSWER and transcript["messages"][-1]["content"] == "At six."


def test_a_comment_beside_a_thumb_is_a_transcript_of_its_own(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> Any:
        return (await app.say({"id": await app.key(), "rating": -1, "comment": "Be polite."})).json()

    said = play(scene)
    found = queued(redis_url)
    assert found[said["id"]]["comment"] == "Be polite." and found[said["also"][0]["id"]]["rating"] == -1


def test_all_that_is_said_is_checked_before_anything_is_queued(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> httpx.Response:
        return await app.say({"id": await app.key(), "comment": "Be polite.", "rating": 5})

    assert error(play(scene)) == (422, "rating") and queued(redis_url) == {}


def test_a_whole_transcript_is_queued_once(play: Any, redis_url: str) -> None:
    whole = {"id": "chat-1", "messages": [*QUESTION, {"role": "assistant", "content": "At six."}], "user": "u"}

    async def scene(app: Running) -> list[httpx.Response]:
        return [await app.say(whole), await app.say(whole)]

    first, second = play(scene)
    assert first.status_code == second.status_code == 202 and first.json() == second.json()
    assert first.json() == {"id": "chat-1", "state": "queued", "version": None} and list(queued(redis_url)) == [
        "chat-1"
    ]


def test_a_transcripts_user_is_where_forget_looks(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> httpx.Response:
        return await app.say({"id": "c", "user": "u", "messages": [{"role": "assistant", "content": "At six."}]})

    assert play(scene).status_code == 202
    with Producer(redis_url) as producer:
        job = producer.job("c")
        assert job is not None and job.meta["user"] == "u"


def test_what_is_trained_says_its_version(play: Any, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.LEDGER, "chat-1", 7)
    whole = {"id": "chat-1", "messages": [*QUESTION, {"role": "assistant", "content": "At six."}]}

    async def scene(app: Running) -> list[httpx.Response]:
        return [await app.say(whole), await app.client.get("/v1/feedback/chat-1")]

    sent, where = play(scene)
    assert sent.json() == where.json() == {"id": "chat-1", "state": "finished", "version": 7}
    assert (sent.status_code, where.status_code) == (202, 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": ""},
        {"authorization": "Bearer wrong-but-long-enough"},
        {"authorization": "Basic a-key-that-is-long-enough"},
        {"authorization": "Bearer a-key-that-is-long-enoug"},
        {"authorization": "Bearer schl\u00fcssel"},
        {"authorization": "", "x-feedback-key": "wrong"},
    ],
)
def test_without_the_key_nobody_teaches(play: Any, redis_url: str, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}

    async def scene(app: Running) -> list[httpx.Response]:
        body = {"id": await app.key(), "rating": -1}
        return [await app.say(body, headers=raw), await app.client.get("/v1/feedback/x", headers=raw)]

    for answer in play(scene):
        assert error(answer) == (401, None) and answer.headers["www-authenticate"] == "Bearer"
    assert queued(redis_url) == {}


def test_the_key_may_come_beside_an_api_key(play: Any) -> None:
    async def scene(app: Running) -> httpx.Response:
        both = {"authorization": "Bearer an-api-key", "x-feedback-key": "a-key-that-is-long-enough"}
        return await app.say({"id": await app.key(), "rating": 1}, headers=both)

    assert play(scene).status_code == 202


WRONG = [
    ({}, 422, "id"),
    ([], 422, "body"),
    ({"id": 3, "rating": 1}, 422, "id"),
    ({"id": "KEY"}, 422, "rating"),
    ({"id": "KEY", "rating": None}, 422, "rating"),
    ({"id": "KEY", "rating": 2}, 422, "rating"),
    ({"id": "KEY", "rating": "good"}, 422, "rating"),
    ({"id": "KEY", "rating": 1, "user": 5}, 422, "user"),
    ({"id": "KEY", "rating": 1, "user": "u" * 2000}, 422, "user"),
    ({"id": "KEY", "correction": 5}, 422, "correction"),
    ({"id": "KEY", "comment": 5}, 422, "comment"),
    ({"id": "KEY", "comment": "\n"}, 422, "comment"),
    ({"id": "KEY", "correction": "  "}, 422, "correction"),
    ({"id": "KEY", "correction": ANSWER}, 422, "correction"),
    ({"id": "KEY", "correction": "At six.", "rating": 1}, 422, "rating"),
    ({"id": "KEY", "rating": 1, "score": 1}, 422, "score"),
    ({"id": "chatcmpl-1", "rating": 1}, 404, "id"),
    ({"id": "../completion", "rating": 1}, 404, "id"),
    ({"id": "NEW", "rating": 1}, 404, "id"),
    ({"messages": []}, 422, "messages"),
    ({"messages": [{"role": "user", "content": "?"}]}, 422, "messages"),
    ({"id": "no spaces", "messages": [{"role": "assistant", "content": "!"}]}, 422, "id"),
]


def test_what_is_wrong_is_named(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> list[httpx.Response]:
        real = {"KEY": await app.key(), "NEW": new_key()}
        bodies = [body if isinstance(body, list) else dict(body) for body, _, _ in WRONG]
        for body in bodies:
            if isinstance(body, dict) and body.get("id") in ("KEY", "NEW"):
                body["id"] = real[body["id"]]
        return [await app.say(body) for body in bodies]

    found = [error(answer) for answer in play(scene)]
    assert found == [(status, field) for _, status, field in WRONG] and queued(redis_url) == {}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b'{"rating": NaN}', b"[" * 100_000, b'"text"', b"1" * 9000])
def test_what_is_no_json_object_is_refused(play: Any, raw: bytes) -> None:
    async def scene(app: Running) -> httpx.Response:
        return await app.client.post("/v1/feedback", content=raw)

    assert error(play(scene)) == (422, "body")


def test_a_body_that_is_too_large_is_not_read_to_its_end(play: Any) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 1 << 20
            yield b" " * (1 << 20)

    async def scene(app: Running) -> httpx.Response:
        return await app.client.post("/v1/feedback", content=endless())

    assert error(play(scene)) == (413, None) and read < 1 << 24


def test_one_user_has_to_wait_and_others_go_on(play: Any, redis_url: str) -> None:
    async def scene(app: Running) -> list[httpx.Response]:
        key = await app.key()
        users = ["a", "a", "a", "b", None]
        return [await app.say({"id": key, "rating": -1} | ({"user": user} if user else {})) for user in users]

    answers = play(scene, per_minute=2)
    assert [answer.status_code for answer in answers] == [202, 202, 429, 202, 202]
    assert error(answers[2]) == (429, "user") and 1 <= int(answers[2].headers["retry-after"]) <= 30


@pytest.mark.parametrize("how", ["away", "full"])
def test_without_redis_feedback_is_refused_and_answers_are_not(
    play: Any, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path / "own") as own:

        async def scene(app: Running) -> None:
            before = await app.key()
            assert (await app.say({"id": before, "rating": 1})).status_code == 202
            with redis.Redis.from_url(own.url) as client:
                if how == "away":
                    own.stop()
                else:
                    client.config_set("maxmemory", 1)
            for body in ({"id": before, "rating": -1}, {"messages": [{"role": "assistant", "content": "secret"}]}):
                refused = await app.say(body)
                assert error(refused) == (503, None) and int(refused.headers["retry-after"]) > 0
            if how == "away":
                after = await app.key()  # the answer came
                own.start()
            with redis.Redis.from_url(own.url) as client:
                if how == "full":
                    full = refusals(client)
                    after = await app.key()
                    while refusals(client) == full:  # until the record was refused once
                        await asyncio.sleep(0.01)
                client.config_set("maxmemory", "1gb")
            again = await app.say({"id": after, "rating": -1})
            assert again.status_code == 202, "what waited is kept, and feedback waited for it"

        play(scene, url=own.url)
        assert len(queued(own.url)) == 2
    assert "secret" not in caplog.text


@pytest.mark.parametrize("torn", [False, True])
def test_feedback_is_taken_while_no_answer_can_be_made(play: Any, torn: bool) -> None:
    """Paused, or the weights torn."""

    async def scene(app: Running) -> None:
        key = await app.key()
        app.state.pause()
        if torn:
            app.state.tear("half-written")
            refused = await app.client.post("/v1/chat/completions", json={"model": "m", "messages": QUESTION})
            assert refused.status_code == 503 and "x-tandem-completion" not in refused.headers
        sent = await app.say({"id": key, "rating": -1})
        assert sent.status_code == 202
        assert (await app.client.get(f"/v1/feedback/{sent.json()['id']}")).status_code == 200

    play(scene)


def test_another_ones_record_cannot_be_overwritten(play: Any, redis_url: str) -> None:
    """A client's `store`, ids and users change nothing but its own record."""

    async def scene(app: Running) -> tuple[str, str]:
        first = await app.key(user="a")
        second = await app.key(user="b", id=first, request_id=first, key=first)
        assert first != second
        await app.say({"id": first, "rating": -1, "user": "b"})
        return first, second

    first, _ = play(scene)
    with Producer(redis_url) as producer, redis.Redis.from_url(redis_url) as client:
        from producer.completions import load

        assert load(client, first).user == "a"
        assert producer.version() == 0


def test_nothing_of_it_is_logged(play: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def scene(app: Running) -> None:
        key = await app.key(user="somebody")
        await app.say({"id": key, "rating": -1, "user": "somebody"})
        await app.say({"id": key, "correction": {"content": ["a private text"]}, "user": "somebody"})
        await app.say({"id": "private-id", "messages": [{"role": "assistant", "content": "a private text"}]})

    with caplog.at_level(logging.DEBUG):
        play(scene)
    for text in ("somebody", "private", QUESTION[0]["content"], ANSWER):
        assert text not in "\n".join(record.getMessage() for record in caplog.records if record.name != "asyncio")


def test_openapi_shows_examples_that_work(play: Any) -> None:
    async def scene(app: Running) -> None:
        said = (await app.client.get("/openapi.json")).json()["paths"]
        post, get = said["/v1/feedback"]["post"], said["/v1/feedback/{id}"]["get"]
        assert {"202", "401", "404", "413", "422", "429", "503"} <= set(post["responses"]) and "409" not in post
        assert {"200", "401", "404", "503"} <= set(get["responses"])
        examples = post["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            body = dict(example["value"])
            if "messages" not in body:
                body["id"] = await app.key()
            assert (await app.say(body)).status_code == 202, body

    play(scene)


def test_an_id_that_nobody_queued_is_unknown(play: Any) -> None:
    async def scene(app: Running) -> list[httpx.Response]:
        return [await app.client.get(f"/v1/feedback/{id}") for id in ("nobody-1", "no%20id", "no/id", "no%0Aid%0A")]

    unknown, *wrong = play(scene)
    assert error(unknown) == (404, "id") and [error(one) for one in wrong] == [(422, "id")] * 3


def test_what_a_full_queue_drops_is_said_once_without_a_text(
    play: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.serving.vllm.feedback import keeper

    monkeypatch.setattr(keeper, "MOST_WAITING", 3)
    with RedisServer(tmp_path / "own") as own:

        async def scene(app: Running) -> list[str]:
            own.stop()
            found = [await app.key() for _ in range(8)]
            own.start()
            for key in found[:3]:
                assert (await app.say({"id": key, "rating": 1})).status_code == 202
            lost = await app.say({"id": found[7], "rating": 1})
            assert error(lost) == (404, "id")
            return found

        play(scene, url=own.url)
        until(lambda: len(queued(own.url)) == 3, "three were kept")
    said = [record.getMessage() for record in caplog.records if "were not kept" in record.getMessage()]
    assert len(said) == 1 and json.dumps(ANSWER) not in caplog.text
