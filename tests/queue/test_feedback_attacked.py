"""/v1/feedback when many come at once, and when somebody else wrote to its Redis: no call fails that need not."""

import asyncio
from typing import Any

import httpx
import pytest
import redis
from completion_parts import completion
from feedback_app import Running
from test_feedback_http import error, play, queued  # noqa: F401  (play: a fixture)

from producer import keys
from producer.completions import OVERHEAD, Completion, Kept, new_key, save
from worker.serving.vllm.feedback import requests
from worker.serving.vllm.feedback.keeper import Keeper
from worker.serving.vllm.feedback.recorder import Seen
from worker.serving.vllm.feedback.samples import Samples

USERS, CONNECTIONS = 120, 40
"""Calls at a time, and the connections that the server may open for them."""


def test_many_users_rate_one_answer_at_the_same_moment(play: Any, redis_url: str) -> None:  # noqa: F811
    async def scene(app: Running) -> list[httpx.Response]:
        key = await app.key()
        said = ({"id": key, "rating": 1 if i % 4 else -1, "user": f"u{i}"} for i in range(USERS))
        answers = await asyncio.gather(*(app.say(body) for body in said))
        ids = [answer.json()["id"] for answer in answers]
        return [*answers, *await asyncio.gather(*(app.client.get(f"/v1/feedback/{id}") for id in ids))]

    answers = play(scene, url=f"{redis_url}{'&' if '?' in redis_url else '?'}max_connections={CONNECTIONS}")
    assert {answer.status_code for answer in answers} == {200, 202}, answers[0].text
    (transcript,) = queued(redis_url).values()
    assert transcript["rating"] == pytest.approx(0.5)


def test_a_comment_that_is_too_long_leaves_the_correction_beside_it_unqueued(play: Any, redis_url: str) -> None:  # noqa: F811
    async def scene(app: Running) -> httpx.Response:
        return await app.say({"id": await app.key(), "correction": "At six.", "comment": "a" * 9000})

    assert error(play(scene)) == (422, "comment") and queued(redis_url) == {}


def test_what_somebody_else_wrote_to_redis_is_no_server_error(play: Any, redis_url: str) -> None:  # noqa: F811
    with redis.Redis.from_url(redis_url) as client:
        client.hset(keys.LEDGER, mapping={"word": "abc", "bytes": b"\xff", "long": "9" * 5000})
        for name, entry in (("base64", {"type": "2", "exc_string": "!!"}), ("untyped", {"x": b"\xff"})):
            client.hset(f"rq:job:{name}", "status", "failed")
            client.xadd(f"rq:results:{name}", entry)

    async def scene(app: Running) -> list[httpx.Response]:
        whole = {"id": "word", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
        names = ("word", "bytes", "long", "base64", "untyped")
        return [await app.say(whole), *[await app.client.get(f"/v1/feedback/{name}") for name in names]]

    answers = play(scene)
    assert [answer.status_code for answer in answers] == [503] * 4 + [200] * 2
    assert all(answer.json()["state"] == "failed" and "cannot be read" in answer.text for answer in answers[4:])


def test_a_server_counts_again_what_records_take(play: Any, redis_url: str) -> None:  # noqa: F811
    """Its first record at the latest undoes what somebody wrote there."""
    with redis.Redis.from_url(redis_url) as client:
        one = completion()
        save(client, one, 3600, 1 << 30)
        client.set(keys.COMPLETION_BYTES, 0)

        async def scene(app: Running) -> None:
            assert (await app.say({"id": await app.key(), "rating": 1})).status_code == 202

        play(scene)
        sizes = [client.strlen(name) + OVERHEAD for name in client.scan_iter("completion:*")]
        assert len(sizes) == 2 and int(client.get(keys.COMPLETION_BYTES)) == sum(sizes)


def test_recording_outlives_an_error_that_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    asked = requests.read("chat", b'{"messages": [{"role": "user", "content": "private"}]}')
    assert asked is not None
    answer = b'{"id": "c", "choices": [{"index": 0, "message": {"content": "private"}}]}'
    saved: list[str] = []

    async def save(completion: Completion) -> Kept:
        saved.append(completion.key)
        if len(saved) == 1:
            raise AttributeError("private")  # as a client's bug would
        return Kept.KEPT

    async def scene() -> list[bool]:
        keeper = Keeper(save)
        keeper.start()
        keys = [new_key(), new_key()]
        for key in keys:
            keeper.keep(Seen(asked, [key], Samples(True, lambda: True), 0.0, False, "3", [answer]))
        settled = [await keeper.settled(key, 30) for key in keys]
        await keeper.stop()
        return settled

    assert asyncio.run(scene()) == [True, True] and len(saved) == 2
    assert "AttributeError" in caplog.text and "private" not in caplog.text
