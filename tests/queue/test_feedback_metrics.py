"""What is kept and what is fed back is counted, where the real routes and the real keeper do it."""

import asyncio
from typing import Any

import pytest
from feedback_app import running


def test_a_completion_that_finds_no_place_is_counted(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.serving.vllm.feedback.keeper.MOST_WAITING", 0)

    async def run() -> Any:
        async with running(redis_url, monkeypatch) as app:
            await app.key()
            return app.registry.get_sample_value("tandem_completions_total", {"outcome": "dropped"})

    assert asyncio.run(run()) == 1


def test_completions_and_feedback_are_counted(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> dict[tuple[str, str], Any]:
        async with running(redis_url, monkeypatch) as app:
            key = await app.key()
            assert (await app.say({"id": key, "rating": 1, "user": "u"})).status_code == 202  # waits for the record
            assert (await app.say({"id": "unknown-key", "rating": 1})).status_code == 404
            assert (await app.say({"id": key, "rating": "?"})).status_code == 422
            assert (await app.client.get("/v1/feedback/nobody")).status_code == 404
            wrong = {"authorization": "Bearer wrong"}
            assert (await app.client.post("/v1/feedback", json={}, headers=wrong)).status_code == 401
            return {
                (sample.name, next(iter(sample.labels.values()), "")): sample.value
                for family in app.registry.collect()
                for sample in family.samples
            }

    found = asyncio.run(run())
    assert found["tandem_completions_total", "kept"] == 1 and found["tandem_completions_total", "dropped"] == 0
    codes = {code: value for (name, code), value in found.items() if name == "tandem_feedback_requests_total" and value}
    assert codes == {"202": 1, "401": 1, "404": 2, "422": 1}
