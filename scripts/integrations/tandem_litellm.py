"""A callback for LiteLLM: hands the key of a recorded answer, X-Tandem-Completion, to the application.

In an application:                                       In the proxy's config.yaml, beside this file:

    import litellm                                           litellm_settings:
    from tandem_litellm import TandemKeys, keys_of             callbacks: tandem_litellm.tandem

    response = litellm.completion(...)
    keys_of(response)                                    # -> ["1vCk..."]; of a stream too, before its chunks
    litellm.callbacks = [TandemKeys(keep)]               # or: keep(completed) is called after each answer

LiteLLM shows a server's headers as `llm_provider-...`. Behind the proxy, the callback sends the header under its own
name again, so that clients need not know whether there is a proxy. What an application says of an answer it sends to
`POST /v1/feedback` itself, or with `producer.rate(key, ...)`: LiteLLM has no feedback of its own.
Must not know: Tandem's packages, the feedback key.
Invariants: an answer is never lost or delayed for its key; texts are neither kept nor logged.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

HEADER = "x-tandem-completion"
log = logging.getLogger("tandem.litellm")


@dataclass(frozen=True)
class Completed:
    """An answer that is recorded. keys: one for each choice, in their order. id: the completion's. call_id: LiteLLM's,
    which its proxy answers as x-litellm-call-id. user: of the request. metadata: what the application gave LiteLLM."""

    keys: list[str]
    id: str | None
    call_id: str | None
    user: str | None
    metadata: Mapping[str, Any]


def keys_of(response: Any) -> list[str]:
    """The keys of a response of LiteLLM's, or of its stream, one for each choice; none: it is not recorded."""
    hidden = getattr(response, "_hidden_params", None)
    if not isinstance(hidden, Mapping):
        return []
    return _keys(hidden.get("additional_headers")) or _keys(hidden.get("headers"))


def _keys(headers: Any) -> list[str]:
    if not isinstance(headers, Mapping):
        return []
    for name, value in headers.items():
        if str(name).lower().removeprefix("llm_provider-") == HEADER and isinstance(value, str):
            return [key for part in value.split(",") if (key := part.strip())]
    return []


class TandemKeys(CustomLogger):
    """keep: called with `Completed` after each recorded answer; it may be a coroutine function where calls are
    awaited (`acompletion`, the proxy). None: only the proxy's header is sent."""

    def __init__(self, keep: Callable[[Completed], Any] | None = None) -> None:
        super().__init__()
        self.keep = keep

    def log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """After an answer of `completion`; of a stream, after its end."""
        if self.keep is None or (completed := _completed(kwargs, response_obj)) is None:
            return
        if inspect.iscoroutinefunction(self.keep):
            log.error(
                "keep is a coroutine function, and this call is not awaited: use acompletion, or a plain function"
            )
            return
        try:
            self.keep(completed)
        except Exception:
            log.exception("what was to keep the key of a recorded answer failed")

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """After an answer of `acompletion` and of the proxy; of a stream, after its end."""
        if self.keep is None or (completed := _completed(kwargs, response_obj)) is None:
            return
        try:
            waits = self.keep(completed)
            if inspect.isawaitable(waits):
                await waits
        except Exception:
            log.exception("what was to keep the key of a recorded answer failed")

    async def async_post_call_response_headers_hook(
        self, data: Any, user_api_key_dict: Any, response: Any, request_headers: Any = None, **_: Any
    ) -> dict[str, str] | None:
        """The header that the proxy sends with an answer, before a stream's first chunk."""
        found = keys_of(response)
        return {"X-Tandem-Completion": ", ".join(found)} if found else None


def _completed(kwargs: Any, response: Any) -> Completed | None:
    found = keys_of(response) or _keys(kwargs.get("response_headers"))
    if not found:
        return None
    given = kwargs.get("litellm_params") or {}
    metadata = given.get("metadata") if isinstance(given, Mapping) else None
    user = (kwargs.get("optional_params") or {}).get("user") or kwargs.get("user")
    return Completed(
        keys=found,
        id=getattr(response, "id", None),
        call_id=kwargs.get("litellm_call_id"),
        user=user if isinstance(user, str) and user else None,
        metadata=metadata if isinstance(metadata, Mapping) else {},
    )


tandem = TandemKeys()
"""For the proxy, which takes an instance by its name."""
