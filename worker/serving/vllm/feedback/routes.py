"""POST /v1/feedback and GET /v1/feedback/{id}: what users say of answers, for applications in any language.

Whoever shows the key may teach: as a bearer token, or, where the server's --api-key takes that place, as
X-Feedback-Key. Works while the weights are torn or paused: feedback needs Redis and nothing else.
Must not know: vLLM.
Invariants: a key that was guessed or chosen says nothing of anybody's completion; what is answered 202 is queued; a
known id is no error; no text, user or name of a transcript is logged; every failure has a status that says whose it is.
"""

import asyncio
import functools
import hashlib
import hmac
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.convertors import PathConvertor, register_url_convertor

from producer import AsyncProducer, Outcome, State
from producer.errors import InvalidTranscriptError, QueueUnavailableError, UnknownCompletionError
from producer.outcomes import AsyncEnqueued
from producer.plain import as_text, parse_json
from producer.transcript import MAX_BYTES, check_id
from worker.serving.feedback_options import FeedbackOptions
from worker.serving.protocol import FEEDBACK_PATH
from worker.serving.vllm.feedback import opinions, schema
from worker.serving.vllm.feedback.keeper import Keeper
from worker.serving.vllm.feedback.rate import RateLimit


class _AnyText(PathConvertor):
    """Starlette's own `path` stops at a newline."""

    regex = "(?s:.*)"


MAX_BODY = 2 * MAX_BYTES
"""Bytes. JSON may escape a text to twice its length and more; a transcript's own limit is half of this."""
MAX_USER = 1024
REDIS_SECONDS = 10.0
TURNS = 32
"""Calls that talk to Redis at a time, each with a connection. Those that name the same answer take turns: as
transactions they would only disturb each other."""
RETRY_SECONDS = 5
"""What Retry-After says when Redis is away."""


Route = Callable[..., Awaitable[JSONResponse]]


class Refusal(Exception):
    """An answer that is no success: status, sentence, the field that is wrong, seconds after which to try again."""

    def __init__(self, status: int, message: str, param: str | None = None, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry = status, message, param, retry

    def answer(self) -> JSONResponse:
        """In the shape of OpenAI's errors."""
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}
        error = {"message": self.message, "type": names.get(self.status, "invalid_request_error")}
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": error | {"param": self.param, "code": self.status}}, self.status, headers)


class FeedbackRoutes:
    """The two routes. producer, keeper: give theirs, None while the server is starting; no keeper: none are kept.
    count: is told the status of each answer."""

    def __init__(
        self,
        options: FeedbackOptions,
        producer: Callable[[], AsyncProducer | None],
        keeper: Callable[[], Keeper | None],
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._count = count
        self._key = _digest(options.key)
        self._producer, self._keeper = producer, keeper
        self._rate = RateLimit(options.per_minute)
        self._turns = [asyncio.Lock() for _ in range(TURNS)]

    def attach(self, app: FastAPI) -> None:
        """Add the routes, and what /openapi.json says of them."""
        add = app.add_api_route
        post, get = self._counted(self._post), self._counted(self._get)
        add(FEEDBACK_PATH, post, methods=["POST"], status_code=202, openapi_extra=schema.POST, tags=["feedback"])
        register_url_convertor("any", _AnyText())
        path = FEEDBACK_PATH + "/{id:any}"  # what has a slash or a newline in it is no id either, and is told so
        add(path, get, methods=["GET"], openapi_extra=schema.GET, tags=["feedback"])

    def _counted(self, route: Route) -> Route:
        """`route`, each answer of which is counted."""

        @functools.wraps(route)
        async def counted(*args: Any, **named: Any) -> JSONResponse:
            status = 500
            try:
                answer = await route(*args, **named)
                status = answer.status_code
                return answer
            finally:
                self._count(status)

        return counted

    async def _post(self, request: Request) -> JSONResponse:
        """Say something of a kept completion, or hand in a whole transcript. Learnt with one of the next versions."""
        try:
            producer = self._admit(request)
            body = _fields(await _body(request))
            user = _user(body)
            if wait := self._rate.take(user):
                raise Refusal(429, f"too much feedback by this user: try again in {wait} s", "user", wait)
            async with asyncio.timeout(REDIS_SECONDS):
                first, *others = await self._queue(producer, body, user)
                return JSONResponse(first | ({"also": others} if others else {}), 202)
        except Refusal as refusal:
            return refusal.answer()
        except InvalidTranscriptError as error:
            return Refusal(422, str(error), error.field).answer()
        except UnknownCompletionError as error:
            return Refusal(404, str(error), "id").answer()
        except (QueueUnavailableError, TimeoutError) as error:
            return _unavailable(error).answer()

    async def _get(self, id: str, request: Request) -> JSONResponse:
        """Where a transcript is, and the version of the weights that contains it."""
        try:
            producer = self._admit(request)
            async with asyncio.timeout(REDIS_SECONDS), self._turn(check_id(id)):
                status = await producer.status(id)
            if status.state is State.UNKNOWN:
                raise Refusal(404, "no transcript has this id: it was never queued here, or was deleted", "id")
            answer = {"id": status.id, "state": str(status.state), "version": status.version}
            return JSONResponse(answer | ({"reason": status.reason} if status.reason else {}))
        except Refusal as refusal:
            return refusal.answer()
        except InvalidTranscriptError as error:
            return Refusal(422, str(error), error.field).answer()
        except (QueueUnavailableError, TimeoutError) as error:
            return _unavailable(error).answer()

    def _admit(self, request: Request) -> AsyncProducer:
        """The producer, for who shows the key. Every key that was shown is compared, each in constant time."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = [bearer if scheme.lower() == "bearer" else "", request.headers.get("x-feedback-key", "")]
        if not any([hmac.compare_digest(_digest(key.strip()), self._key) for key in shown]):
            raise Refusal(401, "the key of feedback is missing or wrong: send it as a bearer token or X-Feedback-Key")
        producer = self._producer()
        if producer is None:
            raise Refusal(503, "the server is starting", retry=RETRY_SECONDS)
        return producer

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns[zlib.crc32(name.encode(errors="surrogatepass")) % TURNS]

    async def _queue(self, producer: AsyncProducer, body: dict[str, Any], user: str | None) -> list[dict[str, Any]]:
        """What became of each thing that is said."""
        if "messages" in body:
            async with self._turn(str(body.get("id"))):
                return [await _state(producer, one) for one in await opinions.hand_in(producer, body, user)]
        key, said = opinions.read(body, user)
        keeper = self._keeper()
        if keeper is not None and not await keeper.settled(key, REDIS_SECONDS / 2):
            raise Refusal(503, "the completion is not in Redis yet", retry=RETRY_SECONDS)
        async with self._turn(key):
            return [await _state(producer, one) for one in await opinions.say(producer, key, said)]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


async def _body(request: Request) -> bytes:
    """The whole body. Raises Refusal (413) as soon as it is known to be too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise Refusal(413, f"the body has more than {MAX_BODY:,} bytes; shorten the transcript")
        parts.append(part)
    return b"".join(parts)


def _fields(raw: bytes) -> dict[str, Any]:
    try:
        body = parse_json(raw.decode())
    except UnicodeDecodeError:
        raise Refusal(422, "body: is not UTF-8", "body") from None
    except ValueError as error:
        raise Refusal(422, f"body: {error}", "body") from None
    if not isinstance(body, dict):
        raise Refusal(422, 'body: must be an object: {"id": ..., "rating": ...}, or a transcript', "body")
    return body


def _user(body: dict[str, Any]) -> str | None:
    user = body.get("user")
    if user is None or user == "":
        return None
    if len(as_text(user, "user")) > MAX_USER:
        raise InvalidTranscriptError("user", f"has {len(user)} characters, the limit is {MAX_USER}; use a hash of it")
    return str(user)


async def _state(producer: AsyncProducer, sent: AsyncEnqueued) -> dict[str, Any]:
    """What became of it, in the words of `State`."""
    if sent.outcome is Outcome.KNOWN:
        status = await producer.status(sent.id)
        return {"id": sent.id, "state": str(status.state), "version": status.version}
    words = {Outcome.TRAINED: str(State.FINISHED), Outcome.WITHDRAWN: "withdrawn"}
    return {"id": sent.id, "state": words.get(sent.outcome, str(State.QUEUED)), "version": sent.version}


def _unavailable(error: Exception) -> Refusal:
    said = str(error) or f"Redis did not answer within {REDIS_SECONDS:g} s; try again"
    return Refusal(503, said, retry=RETRY_SECONDS)
