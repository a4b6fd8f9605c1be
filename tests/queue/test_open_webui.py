"""scripts/integrations for Open WebUI: the Action against the real /v1/feedback, the poller against a real Redis."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from feedback_app import ANSWER, QUESTION, Running, running
from integration_parts import TOKEN, USER, Page, chat, open_webui, rated, served
from integrations import open_webui_poll
from integrations.open_webui_action import Action
from rq.job import Job
from server_options import FEEDBACK_KEY

from producer.serializer import MsgpackSerializer

SAID = {"role": "assistant", "content": ANSWER}


def queued(url: str) -> dict[str, dict[str, Any]]:
    """Id -> transcript, of all that waits in the queue, in its order."""
    with redis.Redis.from_url(url) as client:
        ids = [one.decode() for one in client.lrange("rq:queue:feedback", 0, -1)]
        jobs = [Job.fetch(one, connection=client, serializer=MsgpackSerializer) for one in ids]
        return {job.id: job.args[0] | {"meta": job.meta} for job in jobs}


@pytest.fixture
def play(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a scene: given the valves of an Action whose server is ours."""

    def run(scene: Callable[[dict[str, Any], Running], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            async with running(redis_url, monkeypatch) as app, served(app.app) as url:
                return await scene({"url": url, "feedback_key": FEEDBACK_KEY}, app)

        return asyncio.run(whole())

    return run


def press(play: Any, *buttons: str, writes: Any = None, body: Any = None, **valves: Any) -> Page:
    page, action = Page(writes), Action()

    async def scene(known: dict[str, Any], _: Running) -> None:
        for button in buttons:
            assert await page.press(action, button, body or chat(), known | valves) is None

    play(scene)
    return page


def test_a_press_is_a_rated_transcript_and_a_second_press_is_no_second_one(play: Any, redis_url: str) -> None:
    page = press(play, "good", "good")
    ((job_id, found),) = queued(redis_url).items()
    assert job_id.startswith("owui-") and USER not in job_id
    assert found["messages"] == [*QUESTION, SAID] and found["rating"] == 1 and found["meta"] == {"user": USER}
    assert [one["type"] for one in page.shown] == ["success", "success"] and page.asked == []


def test_the_answer_that_was_pressed_is_the_last_one_sent_and_alone_is_trained(play: Any, redis_url: str) -> None:
    body = chat(later=True)
    body["messages"] = [{"id": "0", "role": "user", "content": "Hi"}, {"id": "1", **SAID}, *body["messages"]]
    press(play, "bad", body=body, system_prompt="Be brief.")
    (found,) = queued(redis_url).values()
    system = {"role": "system", "content": "Be brief."}
    assert found["messages"] == [system, {"role": "user", "content": "Hi"}, SAID, *QUESTION, SAID]
    assert found["rating"] == -1 and found["train_on"] == "last"


def test_another_thumb_and_an_answer_that_was_edited_are_transcripts_of_their_own(play: Any, redis_url: str) -> None:
    press(play, "good", "bad")
    press(play, "good", body=chat(answer="At six."))
    assert [one["rating"] for one in queued(redis_url).values()] == [1, -1, 1]


def test_a_better_answer_is_preferred_to_the_given_one(play: Any, redis_url: str) -> None:
    page = press(play, "better", "better", writes=" At six. ")
    (found,) = queued(redis_url).values()
    assert found["messages"][-1]["content"] == "At six." and found["rejected"]["content"] == ANSWER
    assert page.asked[0]["value"] == ANSWER


def test_a_comment_is_asked_for(play: Any, redis_url: str) -> None:
    press(play, "comment", writes="Be polite.")
    (found,) = queued(redis_url).values()
    assert found["comment"] == "Be polite." and found["messages"][-1] == SAID


def test_who_closes_the_window_says_nothing(play: Any, redis_url: str) -> None:
    async def scene(valves: dict[str, Any], _: Running) -> None:
        for button, writes in [("better", False), ("better", ANSWER), ("comment", " "), ("comment", True)]:
            page = Page(writes)
            await page.press(Action(), button, chat(), valves)
            assert page.shown == [] and len(page.asked) == 1

    play(scene)
    assert queued(redis_url) == {}


WRONG = [
    ({"feedback_key": "another-key-than-the-server"}, "key of feedback is missing or wrong"),
    ({"url": ""}, "fill in the valves"),
    ({"url": "http://127.0.0.1:1"}, "cannot be reached"),
    ({"url": "http://a b\n"}, "names no server"),
    ({"feedback_key": "with\na-new-line-in-it"}, "names no server"),
]


def test_what_goes_wrong_is_said_without_a_key(play: Any, redis_url: str) -> None:
    async def scene(known: dict[str, Any], _: Running) -> None:
        for valves, says in WRONG:
            page = Page()
            await page.press(Action(), "good", chat(), known | valves)
            (shown,) = page.shown
            assert shown["type"] == "error" and says in shown["content"]
            assert (known | valves)["feedback_key"] not in shown["content"]

    play(scene)
    assert queued(redis_url) == {}


def test_what_cannot_be_trained_is_refused_by_field_and_a_lost_page_is_said(play: Any, redis_url: str) -> None:
    call = 'A<details type="tool_calls" done="true">\n<summary>x</summary>\n</details>'
    lost = {"error": "Client session disconnected."}

    async def scene(valves: dict[str, Any], _: Running) -> list[str]:
        page = Page(lost)
        for button, answer in [("good", call), ("good", ""), ("comment", ANSWER)]:
            await page.press(Action(), button, chat(answer=answer), valves)
        assert {one["type"] for one in page.shown} == {"error"}
        return [one["content"] for one in page.shown]

    refused, empty, gone = play(scene)
    assert "messages[1]" in refused and "422" in refused
    assert "no answer here" in empty and "disconnected" in gone and queued(redis_url) == {}


def test_an_api_key_goes_beside_the_key_of_feedback_and_no_key_follows_a_redirect(play: Any) -> None:
    arrived: list[dict[str, str]] = []
    other = FastAPI()

    @other.middleware("http")
    async def seen(request: Any, _: Any) -> Any:
        arrived.append(dict(request.headers))
        return RedirectResponse("/elsewhere", 302)

    async def scene(valves: dict[str, Any], _: Running) -> Page:
        page = Page()
        async with served(other) as url:
            await page.press(Action(), "good", chat(), valves | {"url": url + "/v1/", "api_key": "who-may-ask"})
        return page

    (shown,) = play(scene).shown
    (headers,) = arrived
    assert headers["authorization"] == "Bearer who-may-ask" and headers["x-feedback-key"] == FEEDBACK_KEY
    assert "redirect" in shown["content"]


def poll(entries: list[Any], *options: str, redis_url: str, token: str = TOKEN, app: Any = None) -> Any:
    """The command's result."""

    async def whole() -> Any:
        async with served(app or open_webui(entries)) as url:
            arguments = [url, "--redis", redis_url, *options]
            runner = CliRunner(env={"OPEN_WEBUI_TOKEN": token})
            return await asyncio.to_thread(runner.invoke, open_webui_poll.command, arguments)

    return asyncio.run(whole())


def test_feedback_is_queued_once_with_its_chat_and_its_user(redis_url: str) -> None:
    entries = [rated(1, 1, when=10), rated(2, -1, when=11, user="u2"), rated(3, None, when=12)]
    first, second = (poll(entries, redis_url=redis_url) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    assert "queued 2, already known 0, rejected 0" in first.output and "1 feedback entry without" in first.output
    assert "queued 0, already known 2" in second.output
    found = queued(redis_url)
    assert {name: (one["rating"], one["meta"]["user"]) for name, one in found.items()} == {
        entries[0]["id"]: (1, USER),
        entries[1]["id"]: (-1, "u2"),
    }
    assert found[entries[0]["id"]]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert TOKEN not in first.output


def test_with_a_file_of_state_only_what_is_new_is_read(redis_url: str, tmp_path: Path) -> None:
    state = tmp_path / "feedback.time"
    bad = rated(2, 1, when=10, answer="") | {"snapshot": None}
    entries = [rated(1, 1, when=10), bad]
    first = poll(entries, "--state", str(state), redis_url=redis_url)
    assert first.exit_code == 1 and "queued 1, already known 0, rejected 1" in first.output
    assert bad["id"] in first.output and "snapshot" in first.output
    entries += [rated(3, 1, when=10), rated(4, 1, when=11)]  # one in the second that was read already
    second = poll(entries, "--state", str(state), redis_url=redis_url)
    assert second.exit_code == 0 and "queued 2, already known 0, rejected 0" in second.output
    assert json.loads(state.read_text()) == {"time": 11, "ids": [entries[3]["id"]]}
    state.write_text("x")
    assert "no file of this command's" in poll(entries, "--state", str(state), redis_url=redis_url).output


def test_dislikes_can_be_left_out(redis_url: str) -> None:
    said = poll([rated(1, -1, when=1)], "--dislikes", "leave-out", redis_url=redis_url)
    assert said.exit_code == 0 and "1 disliked answer left out" in said.output and queued(redis_url) == {}


def test_what_is_lost_on_the_way_moves_no_time(redis_url: str, tmp_path: Path) -> None:
    state = tmp_path / "feedback.time"
    cut = json.dumps([rated(2, 1, when=11), rated(1, 1, when=10)])[:-200]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": cut.encode()})

    said = poll([], "--state", str(state), redis_url=redis_url, app=app)
    assert said.exit_code == 1 and "it was cut off" in said.output and not state.exists()
    assert "queued 1, already known 0, rejected" in said.output
    with_no_redis = poll([rated(1, 1, when=1)], "--state", str(state), redis_url="redis://127.0.0.1:1/0")
    assert with_no_redis.exit_code == 1 and "error: " in with_no_redis.output and not state.exists()


def test_a_wrong_token_and_a_wrong_url_are_said(redis_url: str) -> None:
    refused = poll([], redis_url=redis_url, token="sk-wrong")
    assert refused.exit_code == 1 and "401" in refused.output and "sk-wrong" not in refused.output
    assert "404" in poll([], redis_url=redis_url, app=FastAPI()).output
    assert "OPEN_WEBUI_TOKEN is missing" in poll([], redis_url=redis_url, token="").output
