"""What the tests of scripts/integrations share: applications on a port, and Open WebUI's side of its interfaces.

Written from the source of Open WebUI 0.12.4 (utils/actions.py, socket/main.py, routers/evaluations.py, and the page's
chatActionHandler); Open WebUI itself is too large to be installed here.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.types import ASGIApp

TOKEN = "sk-of-an-administrator"
USER = "6d2b1c9e-0000-4000-8000-00000000000a"
ANSWER_ID = "4f0c3a52-0000-4000-8000-000000000002"


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The URL of `app` on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            assert not running.done(), "the server did not start"
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


def chat(*, question: str = "When does the shop close?", answer: str = "At noon.", later: bool = False) -> Any:
    """What the page posts when a button below `answer` is pressed. later: a message after it is sent too."""
    texts = [("user", question), ("assistant", answer)] + ([("user", "Thanks.")] if later else [])
    ids = ["4f0c3a52-0000-4000-8000-000000000001", ANSWER_ID, "4f0c3a52-0000-4000-8000-000000000003"]
    more = {"timestamp": 1795714869, "info": None}
    return {
        "model": "m",
        "messages": [
            {"id": name, "role": role, "content": text} | more for name, (role, text) in zip(ids, texts, strict=False)
        ],
        "chat_id": "9b1f7f6e-0000-4000-8000-00000000000c",
        "session_id": "s",
        "id": ANSWER_ID,
    }


@dataclass
class Page:
    """A user's page. writes: what the user answers to a window; False: closes it. shown: the notifications. asked: the
    windows."""

    writes: Any = None
    shown: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def emit(self, event: dict[str, Any]) -> None:
        assert event["type"] == "notification"
        self.shown.append(event["data"])

    async def call(self, event: dict[str, Any]) -> Any:
        assert event["type"] == "input"
        self.asked.append(event["data"])
        return self.writes

    async def press(self, action: Any, button: str, body: dict[str, Any], valves: dict[str, Any]) -> Any:
        """As `chat_action` calls an Action: valves first, then the parameters that it names."""
        assert button in [one["id"] for one in action.actions]
        action.valves = action.Valves(**valves)
        extra = {
            "__model__": {"id": "m"},
            "__id__": button,
            "__event_emitter__": self.emit,
            "__event_call__": self.call,
            "__request__": None,
            "__user__": {"id": USER, "name": "Ada", "email": "ada@example.org", "role": "user"},
        }
        known = inspect.signature(action.action).parameters
        return await action.action(body=body, **{name: value for name, value in extra.items() if name in known})


def open_webui(entries: list[Any]) -> FastAPI:
    """An Open WebUI that knows these feedback entries, newest first as there."""
    app = FastAPI()

    @app.get("/api/v1/evaluations/feedbacks/all/export")
    async def export(request: Request) -> list[Any]:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401, "not allowed")
        return sorted(entries, key=lambda entry: -entry["updated_at"])

    return app


def rated(number: int, rating: Any, *, when: int, answer: str = "At noon.", user: str = USER) -> dict[str, Any]:
    """A feedback entry, with its chat, as the export has it."""
    messages = {
        "m1": {"id": "m1", "parentId": None, "childrenIds": ["m2"], "role": "user", "content": "When do you close?"},
        "m2": {"id": "m2", "parentId": "m1", "childrenIds": [], "role": "assistant", "content": answer, "done": True},
    }
    inner = {"params": {"system": "Be brief."}, "history": {"currentId": "m2", "messages": messages}, "messages": []}
    return {
        "id": f"00000000-0000-4000-8000-{number:012}",
        "user_id": user,
        "version": 0,
        "type": "rating",
        "data": {"rating": rating, "model_id": "m", "reason": "", "comment": ""},
        "meta": {"chat_id": "c", "message_id": "m2", "message_index": 1},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": inner}},
        "created_at": when,
        "updated_at": when,
    }
