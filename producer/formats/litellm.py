"""LiteLLM's request logs: the payload of its logging callbacks, and rows of its spend logs.

Read: messages, the first choice of the response, tools and users of the request. Failed requests, calls that are no
chat, answers that were cut off and what LiteLLM redacted or shortened are left out.
"""

import re
from typing import Any

from .. import users
from . import chat, ratings
from .record import LeaveOut, Reason, Record, text_in

_CHAT = ("completion", "acompletion", "chat_completion", "text_completion", "atext_completion")
_REDACTED = "redacted-by-litellm"
_SHORTENED = re.compile(r"\(litellm_truncated\b[^)]{0,200}\d chars")


def read(value: dict[str, Any]) -> Record:
    if value.get("call_type") not in (None, *_CHAT):
        raise LeaveOut(Reason.NO_CHAT)
    if value.get("status") == "failure" or value.get("error_str"):
        raise LeaveOut(Reason.FAILED)
    request = chat.parsed(value.get("proxy_server_request"))
    source = value.get("messages") or (request.get("messages") if isinstance(request, dict) else None)
    asked, said = chat.conversation(source, "messages"), chat.answer(value.get("response"), "response")
    texts = text_in(asked) + text_in(said)
    if any(text == _REDACTED or _SHORTENED.search(text) for text in texts):
        raise LeaveOut(Reason.REDACTED)
    parameters = value.get("model_parameters")
    tools = chat.tools_of(value, parameters, value.get("optional_params"), request)
    fields = chat.answered(asked, said, "response") | tools
    return Record(
        fields=fields,
        id=value.get("id") or value.get("request_id"),
        rating=ratings.beside(value),
        users=users.beside(value, chat.parsed(value.get("metadata")), parameters, request),
    )
