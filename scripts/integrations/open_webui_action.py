"""
title: Tandem feedback
description: Buttons below each answer that teach the model: good, bad, a better answer, a comment.
version: 1.0
"""

# An Action of Open WebUI: paste this file into Admin Panel, Functions, save it, fill in its valves, and switch it on
# for the models that `tandem serve --feedback` serves. Open WebUI's own thumbs only write its database.
#
# Open WebUI does not keep the header X-Tandem-Completion. So the whole conversation is sent, up to the answer.
# Must not know: Tandem's packages, or those of Open WebUI. Only the standard library, and pydantic for the valves.
# Invariants: the same press is the same transcript, by its id; the key of feedback is in no message and no log, and
# goes to the server that the valves name, never to where that one redirects.

import asyncio
import hashlib
import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from pydantic import BaseModel, Field

SECRET = {"input": {"type": "password"}}
ICON = (
    "data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='gray'"
    " stroke-width='2' stroke-linecap='round' stroke-linejoin='round'><path d='{}'/></svg>"
)


def _button(id: str, name: str, path: str) -> dict[str, str]:
    return {"id": id, "name": name, "icon_url": ICON.format(path)}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Problem(Exception):
    """What is shown to the user."""


class Action:
    class Valves(BaseModel):
        url: str = Field(default="", description="Of Tandem's server, such as http://127.0.0.1:8000")
        feedback_key: str = Field(
            default="", description="What `tandem serve --feedback` was started with.", json_schema_extra=SECRET
        )
        api_key: str = Field(
            default="", description="Only if the server has an --api-key: that key.", json_schema_extra=SECRET
        )
        system_prompt: str = Field(
            default="", description="The system prompt of your chats: Open WebUI does not show it to Actions."
        )
        timeout: float = Field(default=30.0, gt=0, description="Seconds to wait for the server.")

    actions = [  # noqa: RUF012 - as Open WebUI reads it
        _button("good", "Good answer: teach it", "M4 13l5 5L20 6"),
        _button("bad", "Bad answer: unteach it", "M6 6l12 12M18 6L6 18"),
        _button("better", "Write a better answer", "M4 20l1-5L16 4l4 4L9 19z"),
        _button("comment", "Say what should have been otherwise", "M4 5h16v11H10l-4 4v-4H4z"),
    ]

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def action(
        self,
        body: dict[str, Any],
        __id__: str = "",
        __user__: dict[str, Any] | None = None,
        __event_emitter__: Any = None,
        __event_call__: Any = None,
    ) -> None:
        """Called when a button is pressed. Changes nothing of the chat."""
        try:
            messages = _conversation(body, self.valves.system_prompt)
            said = await _said(__id__, messages, __event_call__)
            if said is None:
                return  # the user closed the window, or wrote nothing
            answer = await asyncio.to_thread(_post, self.valves, _transcript(said, body, __user__ or {}))
            kind, text = "success", _told(answer)
        except Problem as problem:
            kind, text = "error", f"Tandem: {problem}"
        if __event_emitter__ is not None:
            await __event_emitter__({"type": "notification", "data": {"type": kind, "content": text}})


def _conversation(body: dict[str, Any], system: str) -> list[dict[str, str]]:
    """Role and text of the messages up to the answer below which the button is. Raises Problem."""
    found: list[dict[str, str]] = []
    for message in body.get("messages") or []:
        found.append({"role": message.get("role"), "content": message.get("content")})
        if message.get("id") == body.get("id"):
            break
    if not found or found[-1]["role"] != "assistant" or not found[-1]["content"]:
        raise Problem("there is no answer here. Press the button below one, when it is complete.")
    if system.strip() and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return found


async def _said(button: str, messages: list[dict[str, str]], ask: Any) -> dict[str, Any] | None:
    """The fields of a transcript that say it; None: nothing was said. Raises Problem."""
    if button in ("good", "bad"):
        return {"messages": messages, "train_on": "last", "rating": 1 if button == "good" else -1}
    if button == "better":
        given = messages[-1]["content"]
        text = await _ask(ask, "A better answer", "What should the answer have been?", given)
        if text is None or text == given.strip():
            return None
        return {"messages": messages[:-1], "chosen": text, "rejected": given}
    if button == "comment":
        text = await _ask(ask, "A comment", "What should have been otherwise? Such as: be shorter.", "")
        return None if text is None else {"messages": messages, "comment": text}
    raise Problem("this button is not known. Paste the whole file again, with its list of actions.")


async def _ask(ask: Any, title: str, message: str, value: str) -> str | None:
    """What the user wrote; None where that is nothing, or the window was closed. Raises Problem."""
    if ask is None:
        raise Problem("Open WebUI opened no window to write in.")
    data = {"title": title, "message": message, "placeholder": title, "value": value}
    said = await ask({"type": "input", "data": data})
    if isinstance(said, dict) and said.get("error"):
        raise Problem(str(said["error"]))
    return said.strip() or None if isinstance(said, str) else None


def _transcript(said: dict[str, Any], body: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/feedback. The id follows from the message, the user and what is said of it."""
    who = user.get("id") or None
    known = json.dumps([body.get("chat_id"), body.get("id"), who, said], sort_keys=True)
    name = hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return {"id": f"owui-{name}", **said} | ({"user": who} if who else {})


def _post(valves: Any, transcript: dict[str, Any]) -> dict[str, Any]:
    """The server's answer. Raises Problem."""
    url = valves.url.strip().rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")) or not valves.feedback_key.strip():
        raise Problem("an administrator must fill in the valves url and feedback_key of this function.")
    headers = {"Content-Type": "application/json", "X-Feedback-Key": valves.feedback_key.strip()}
    if valves.api_key.strip():
        headers["Authorization"] = f"Bearer {valves.api_key.strip()}"
    try:
        request = urllib.request.Request(f"{url}/v1/feedback", json.dumps(transcript).encode(), headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=valves.timeout) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise Problem(_refusal(error)) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Problem(f"its server cannot be reached ({type(reason).__name__}). Is the valve url right?") from None
    except (ValueError, http.client.HTTPException):  # no JSON; or a URL or a key that no request can have
        raise Problem("the valve url names no server of Tandem's, or a key has characters that no key has.") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    """One sentence. The server's own say which field is wrong."""
    if 300 <= error.code < 400:
        return "its server sends elsewhere (a redirect). Give the valve url the address itself."
    try:
        return f"{json.load(error)['error']['message']} ({error.code})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"the server answered {error.code}. Was it started with --feedback, and is the valve url right?"


def _told(answer: dict[str, Any]) -> str:
    """What the user is told."""
    if answer.get("version") is not None:
        return f"The model has learnt it already, in version {answer['version']}."
    if answer.get("state") == "failed":
        return "This was said before, and the trainer refused it."
    return "Thank you. The model will learn it."
